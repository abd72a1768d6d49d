//! How the operators sit in Candle's graph: what is tracked, what a second backward sees, what threads may do.

use crate::case::{ARGS, Case, Inputs, Op, Vars};
use crate::compare::{Expected, close, inner, loss, values};
use crate::run::{Graph, MODES};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, Var};
use candle_linear_attn::{Mode, Output, State, linear_attn};

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> =
        Op::ALL.into_iter().map(|op| Case { op, t: 70, group: 2, k: 8, v: 12, ..Case::default() }).collect();
    cases.push(Case { normalize: true, ..cases[0].clone() });
    cases
}

/// One forward with every input a variable.
struct Forward {
    vars: Vars,
    outputs: [Option<Tensor>; 3],
}

fn forward(case: &Case, inputs: &Inputs, mode: Mode) -> Result<Forward> {
    let vars = inputs.args.clone().map(|x| x.map(|x| Var::from_tensor(&x).unwrap()));
    let args = vars.clone().map(|v| v.map(|v| v.as_tensor().clone()));
    let opts = case.options(mode, &args).with_final_state(true);
    let Output { out, state } = case.call(&args, &opts)?;
    let State { kv, z } = state.expect("the final state was asked for");
    let outputs = [Some(out), Some(kv), z];
    Ok(Forward { vars, outputs })
}

pub fn check_grads(vars: &Vars, store: &GradStore, want: &Expected, label: &str) {
    for (i, var) in vars.iter().enumerate() {
        let Some(var) = var else { continue };
        let label = format!("{label}: gradient of {}", ARGS[i]);
        match store.get(var) {
            Some(grad) => close(grad, &want.grads[i], DType::F32, 2e-5, &label).unwrap(),
            None => assert!(want.grads[i].iter().all(|&g| g == 0.0), "{label} is missing"),
        }
    }
}

#[test]
fn a_second_backward_gives_the_same_gradients() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        let want = case.expected(&inputs, [true; 3]).unwrap();
        for mode in MODES {
            let Forward { vars, outputs } = forward(&case, &inputs, mode).unwrap();
            let loss = loss(&outputs, &inputs.cotangents, [true; 3]).unwrap().unwrap();
            for pass in ["first", "second", "third"] {
                let label = format!("{mode:?} of {case:?}, {pass} backward");
                check_grads(&vars, &loss.backward().unwrap(), &want, &label);
            }
        }
    }
}

/// Nothing of one backward may be left over for the next one through other outputs.
#[test]
fn losses_on_different_outputs_of_one_graph_do_not_mix() {
    let sets = [
        [true, false, false],
        [false, true, false],
        [false, false, true],
        [true, true, false],
        [false, true, true],
        [true, false, false],
        [false, true, false],
        [true, true, true],
        [true, false, true],
        [false, false, true],
    ];
    for case in cases() {
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            let Forward { vars, outputs } = forward(&case, &inputs, mode).unwrap();
            for wanted in sets {
                let Some(loss) = loss(&outputs, &inputs.cotangents, wanted).unwrap() else {
                    continue;
                };
                if !case.normalize && wanted == [false, false, true] {
                    continue;
                }
                let want = case.expected(&inputs, wanted).unwrap();
                let label = format!("{mode:?} of {case:?}, loss {wanted:?}");
                check_grads(&vars, &loss.backward().unwrap(), &want, &label);
            }
        }
    }
}

/// The tensors that are left keep alive whatever their gradients need.
#[test]
fn an_output_may_be_dropped_before_the_backward() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            for kept in 0..3 {
                let Forward { vars, outputs } = forward(&case, &inputs, mode).unwrap();
                let [Some(d), Some(x)] = [&inputs.cotangents[kept], &outputs[kept]].map(Clone::clone) else {
                    continue;
                };
                drop(outputs);
                let store = inner(&x, &d).unwrap().backward().unwrap();
                let want = case.expected(&inputs, std::array::from_fn(|i| i == kept)).unwrap();
                let label = format!("{mode:?} of {case:?}, only output {kept} kept");
                check_grads(&vars, &store, &want, &label);
            }
        }
    }
}

#[test]
fn an_output_may_be_used_twice() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        let want = case.expected(&inputs, [true; 3]).unwrap();
        for mode in MODES {
            let Forward { vars, outputs } = forward(&case, &inputs, mode).unwrap();
            // 0.25 + 0.75 of each, by separate paths.
            let mut total = Tensor::zeros((), DType::F32, &candle_core::Device::Cpu).unwrap();
            for (x, d) in outputs.iter().zip(&inputs.cotangents) {
                if let (Some(x), Some(d)) = (x, d) {
                    let quarter = inner(&x.affine(0.25, 0.0).unwrap(), d).unwrap();
                    let rest = inner(x, &d.affine(0.75, 0.0).unwrap()).unwrap();
                    total = ((total + quarter).unwrap() + rest).unwrap();
                }
            }
            let label = format!("{mode:?} of {case:?}");
            check_grads(&vars, &total.backward().unwrap(), &want, &label);
        }
    }
}

/// q, k and v may be one tensor: its gradient is the sum of the three.
#[test]
fn one_tensor_as_q_k_and_v() {
    let case = Case { t: 70, initial_state: false, ..Case::default() };
    let mut inputs = case.inputs().unwrap();
    let x = inputs.args[0].clone();
    [inputs.args[1], inputs.args[2]] = [x.clone(), x.clone()];
    let want = case.expected(&inputs, [true, false, false]).unwrap();
    let sum: Vec<f64> =
        (0..want.grads[0].len()).map(|i| want.grads[0][i] + want.grads[1][i] + want.grads[2][i]).collect();
    for mode in MODES {
        let var = Var::from_tensor(x.as_ref().unwrap()).unwrap();
        let opts = case.options(mode, &Default::default());
        let out = linear_attn(&var, &var, &var, &opts).unwrap().out;
        let d = inputs.cotangents[0].as_ref().unwrap();
        let store = inner(&out, d).unwrap().backward().unwrap();
        close(store.get(&var).unwrap(), &sum, DType::F32, 2e-5, &format!("{mode:?}")).unwrap();
    }
}

/// Two operators, the second fed by the first one's output and by its state: the chain rule by hand.
#[test]
fn one_operator_feeds_another() {
    for op in Op::ALL {
        let case = Case { op, t: 70, k: 16, v: 16, ..Case::default() };
        let first = case.inputs().unwrap();
        let mut second = Case { seed: 1, ..case.clone() }.inputs().unwrap();
        for mode in MODES {
            let Forward { vars, outputs } = forward(&case, &first, mode).unwrap();
            let mut args = second.args.clone();
            args[0] = outputs[0].clone();
            args[4] = outputs[1].clone();
            let label = format!("{op:?} {mode:?}");
            let (_, store) = case.run_on(mode, &args, &second.cotangents, [true, true, false]).unwrap();

            second.args[0] = outputs[0].as_ref().map(|x| x.detach());
            second.args[4] = outputs[1].as_ref().map(|x| x.detach());
            let outer = case.expected(&second, [true, true, false]).unwrap();
            let mut inner_inputs = first.clone();
            for (i, grad) in [(0, &outer.grads[0]), (1, &outer.grads[4])] {
                let shape = outputs[i].as_ref().unwrap().shape();
                let grad = Tensor::from_slice(grad, shape, &candle_core::Device::Cpu).unwrap();
                inner_inputs.cotangents[i] = Some(grad);
            }
            let want = case.expected(&inner_inputs, [true, true, false]).unwrap();
            check_grads(&vars, &store.unwrap(), &want, &label);
        }
    }
}

#[test]
fn nothing_is_tracked_when_no_input_is() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            let Forward { vars, .. } = forward(&case, &inputs, mode).unwrap();
            let detached = vars.clone().map(|v| v.map(|v| v.as_tensor().detach()));
            for args in [&inputs.args, &detached] {
                let opts = case.options(mode, args).with_final_state(true);
                let Output { out, state } = case.call(args, &opts).unwrap();
                let State { kv, z } = state.unwrap();
                assert!(!out.track_op(), "o, {mode:?} of {case:?}");
                assert!(!kv.track_op(), "kv, {mode:?} of {case:?}");
                assert!(!z.is_some_and(|z| z.track_op()), "z, {mode:?} of {case:?}");
            }
        }
    }
}

/// Being part of a graph must not change what is computed.
#[test]
fn tracking_does_not_change_the_result() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            let tracked = forward(&case, &inputs, mode).unwrap().outputs;
            let opts = case.options(mode, &inputs.args).with_final_state(true);
            let plain = case.call(&inputs.args, &opts).unwrap();
            let state = plain.state.unwrap();
            let plain = [Some(plain.out), Some(state.kv), state.z];
            for (a, b) in tracked.iter().zip(&plain) {
                let [a, b] = [a, b].map(|x| x.as_ref().map(|x| values(x).unwrap()));
                assert_eq!(a, b, "{mode:?} of {case:?}");
            }
        }
    }
}

#[test]
fn threads_differentiate_their_own_graphs() {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for mut case in cases() {
                    case.seed = thread;
                    case.check_modes(Graph::ALL).unwrap();
                }
            });
        }
    });
}

/// Candle's tensors are `Sync`: several threads may differentiate one graph, by different losses even.
#[test]
fn threads_differentiate_one_graph() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        let losses = [[true; 3], [true, false, false], [false, true, false]];
        let want = losses.map(|wanted| case.expected(&inputs, wanted).unwrap());
        for mode in MODES {
            let graph = forward(&case, &inputs, mode).unwrap();
            std::thread::scope(|scope| {
                for (wanted, want) in losses.iter().zip(&want) {
                    let (graph, inputs, case) = (&graph, &inputs, &case);
                    scope.spawn(move || {
                        for _ in 0..10 {
                            let loss = loss(&graph.outputs, &inputs.cotangents, *wanted);
                            let store = loss.unwrap().unwrap().backward().unwrap();
                            let label = format!("{mode:?} of {case:?}, loss {wanted:?}");
                            check_grads(&graph.vars, &store, want, &label);
                        }
                    });
                }
            });
        }
    }
}

/// The same from tasks of a thread pool, where a thread that waits in one backward may start another.
#[test]
fn pool_tasks_differentiate_one_graph() {
    use rayon::prelude::*;
    for case in cases() {
        let inputs = case.inputs().unwrap();
        let losses = [[true; 3], [true, false, false], [false, true, false]];
        let want = losses.map(|wanted| case.expected(&inputs, wanted).unwrap());
        for mode in MODES {
            let graph = forward(&case, &inputs, mode).unwrap();
            (0..48usize).into_par_iter().for_each(|i| {
                let wanted = losses[i % 3];
                let loss = loss(&graph.outputs, &inputs.cotangents, wanted);
                let store = loss.unwrap().unwrap().backward().unwrap();
                let label = format!("{mode:?} of {case:?}, loss {wanted:?}");
                check_grads(&graph.vars, &store, &want[i % 3], &label);
            });
        }
    }
}

/// An op without a backward.
struct OneWay;

impl CustomOp1 for OneWay {
    fn name(&self) -> &'static str {
        "one-way"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }
}

/// A backward that stops halfway with an error leaves nothing behind that a later one would add to its own.
#[test]
fn a_failed_backward_leaves_nothing_behind() {
    for case in cases() {
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            for (good, bad) in [(0, 1), (1, 0)] {
                let Forward { vars, outputs } = forward(&case, &inputs, mode).unwrap();
                let term = |i: usize, x: &Tensor| inner(x, inputs.cotangents[i].as_ref().unwrap()).unwrap();
                let output = |i: usize| outputs[i].as_ref().unwrap();
                let fine = term(good, output(good));
                let failing = term(bad, &output(bad).apply_op1(OneWay).unwrap());
                for loss in [&fine + &failing, &failing + &fine] {
                    assert!(loss.unwrap().backward().is_err());
                }
                let only_bad = std::array::from_fn(|i| i == bad);
                let want = case.expected(&inputs, only_bad).unwrap();
                let store = term(bad, output(bad)).backward().unwrap();
                check_grads(&vars, &store, &want, &format!("{mode:?} of {case:?}"));
            }
        }
    }
}

/// The number of threads decides who computes what, not what is computed.
#[test]
fn any_number_of_threads() {
    for threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            for case in cases() {
                case.check_modes(Graph::ALL).unwrap();
                case.check_modes(Graph::NONE).unwrap();
            }
        });
    }
}
