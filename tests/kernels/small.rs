//! Every kernel on small problems: what each mode, dtype, scale, length, head size, layout and gate comes to.

use crate::case::{ARGS, Case, GATE, Gates, Op, SCALES};
use crate::compare::Limits;
use crate::files;
use crate::kernels::{DELTA, IN_CHUNKS, check, limits};
use crate::layout::{self, Layout};
use crate::on_kernels;
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Tensor, Var};
use candle_linear_attn::{Mode, Options, delta_rule, linear_attn};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
/// On both sides of the end of a chunk, and more than one segment of [`Mode::Chunk`].
const LENGTHS: [usize; 7] = [1, 5, 63, 64, 65, 130, 300];

/// The operators, the normalised one too.
fn operators() -> impl Iterator<Item = Case> {
    let plain = Op::ALL.into_iter().map(|op| Case { op, ..Case::default() });
    plain.chain([Case { normalize: true, ..Case::default() }])
}

#[test]
fn every_operator_in_every_mode_and_dtype() {
    for case in operators() {
        for dtype in DTYPES {
            check(&Case { dtype, t: 70, h: 1, group: 2, k: 33, v: 17, ..case.clone() }, &MODES, Graph::ALL);
        }
    }
}

#[test]
fn gates_in_16_bits() {
    for op in Op::GATED {
        for dtype in [DType::BF16, DType::F16] {
            let case = Case { op, dtype, gate_dtype: dtype, t: 70, h: 1, ..Case::default() };
            check(&case, &[Mode::Recurrent, Mode::FusedChunk], Graph::ALL);
        }
    }
}

/// Each length with each scale, and each of both in each mode.
fn every_scale_and_length(case: Case) {
    for (i, t) in LENGTHS.into_iter().enumerate() {
        for (j, scale) in SCALES.into_iter().enumerate() {
            let case = Case { t, scale, h: 1, k: 16, v: 17, seed: (i * 10 + j) as u64, ..case.clone() };
            check(&case, &[MODES[(i + j) % 4], MODES[(i + j + 1) % 4]], Graph::ALL);
        }
    }
}

#[test]
fn linear_attn_for_every_scale_and_length() {
    every_scale_and_length(Case::default());
}

#[test]
fn normalized_linear_attn_for_every_scale_and_length() {
    every_scale_and_length(Case { normalize: true, ..Case::default() });
}

#[test]
fn retention_for_every_scale_and_length() {
    every_scale_and_length(Case { op: Op::Retention, ..Case::default() });
}

#[test]
fn simple_gla_for_every_scale_and_length() {
    every_scale_and_length(Case { op: Op::SimpleGla, ..Case::default() });
}

#[test]
fn gla_for_every_scale_and_length() {
    every_scale_and_length(Case { op: Op::Gla, ..Case::default() });
}

#[test]
fn delta_families_for_every_scale_and_length() {
    for op in DELTA {
        every_scale_and_length(Case { op, ..Case::default() });
    }
}

/// On both sides of the end of a segment and of the number of channels that kernels hold.
#[test]
fn delta_in_chunks_for_every_scale_and_length() {
    let sizes = [(16, 17), (64, 64), (65, 20), (100, 33), (128, 40), (33, 70)];
    for op in DELTA {
        for (i, (k, v)) in sizes.into_iter().enumerate() {
            let (t, scale) = (LENGTHS[1 + i], SCALES[i % SCALES.len()]);
            for dtype in IN_CHUNKS {
                let case = Case { op, k, v, t, scale, dtype, h: 1, group: 2, ..Case::default() };
                check(&case, &[Mode::Chunk, Mode::FusedChunk], Graph::ALL);
            }
        }
    }
}

#[test]
fn scales_in_16_bits() {
    for scale in SCALES {
        for op in [Op::LinearAttn, Op::SimpleGla, Op::GatedDeltaRule, Op::Rwkv7] {
            let case = Case { op, scale, dtype: DType::BF16, t: 130, h: 1, ..Case::default() };
            check(&case, &[Mode::FusedChunk], Graph::ALL);
        }
    }
}

/// To round a result costs 1.66e-3. All that is rounded before must not show beside that.
#[test]
fn outputs_in_bf16_are_rounded_once() {
    for op in Op::ALL {
        let case = Case { op, dtype: DType::BF16, t: 520, h: 1, k: 64, v: 64, ..Case::default() };
        let inputs = case.inputs().unwrap();
        let want = case.expected(&inputs, [false; 3]).unwrap();
        for mode in [Mode::Chunk, Mode::FusedChunk] {
            let label = format!("{mode:?} of {case:?}");
            let limits = Limits { out: 1.75e-3, ..limits(case.dtype) };
            on_kernels(|device| {
                let got = case.run(mode, &inputs.on(device)?, Graph::NONE)?;
                case.check_within(limits, &got, &want, Graph::NONE, &label)
            })
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        }
    }
}

/// Rows that are whole pieces of 16 bytes are copied ahead, in every dtype; where a gate forgets much, a chunk is taken in parts.
#[test]
fn rows_in_whole_pieces() {
    let (f32, f16) = (DType::F32, DType::F16);
    let equal = [(64, 64, f32), (64, 64, f16), (128, 128, f32), (128, 128, f16)];
    // Of these two each take the same kernels.
    let unequal = [(64, 128, f16), (128, 64, f32), (24, 72, f32), (104, 16, f16)];
    for (i, (k, v, dtype)) in equal.into_iter().chain(unequal).enumerate() {
        let gate_dtype = if i % 3 == 0 { f32 } else { dtype };
        for op in Op::ADDITIVE {
            let (t, scale) = (LENGTHS[1 + i % 6], SCALES[i % SCALES.len()]);
            // One strong decay for all tokens leaves a gradient of 1e-32.
            let strong = op != Op::Retention && i.div_ceil(2) % 2 == 1;
            let gates = if strong { Gates::Strong } else { Gates::Mild };
            let case = Case { op, k, v, t, scale, dtype, gates, gate_dtype, h: 1, ..Case::default() };
            check(&case, &[Mode::Chunk, Mode::FusedChunk], Graph::ALL);
        }
        // Without the gate's gradient those of keys have the inputs' dtype, and f32 takes chunks there too.
        let tracked = std::array::from_fn(|n| n != GATE);
        for gates in [Gates::Mild, Gates::AllStrong] {
            let case = Case { op: Op::Gla, k, v, t: 130, dtype, gates, gate_dtype, h: 1, ..Case::default() };
            check(&case, &[Mode::FusedChunk], Graph { tracked, ..Graph::ALL });
        }
    }
    let ends = Some(vec![0, 0, 65, 65, 70, 135]);
    for op in Op::ADDITIVE {
        for dtype in [DType::F32, DType::F16] {
            let case = Case { op, dtype, k: 64, v: 72, t: 135, h: 1, group: 2, ..Case::default() };
            check(&Case { cu_seqlens: ends.clone(), ..case.clone() }, &[Mode::FusedChunk], Graph::ALL);
            check(&Case { t: 300, ..case }, &[Mode::Chunk], Graph::NONE);
        }
    }
}

/// A gate that forgets nearly all, at the first step of a chunk and within one: the others' decays stay accurate.
#[test]
fn a_strong_gate_where_a_chunk_begins() {
    for (k, v, dtype) in [(24, 16, DType::F32), (128, 72, DType::F32), (64, 72, DType::F16)] {
        let case = Case { op: Op::Gla, k, v, dtype, gate_dtype: dtype, t: 150, h: 1, ..Case::default() };
        let mut inputs = case.inputs().unwrap();
        let gate = inputs.args[GATE].take().unwrap();
        let mut shape = gate.dims().to_vec();
        shape[1] = 1;
        let strong = Tensor::full(-90f32, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        // Forwards, and where the decay before a step is that of the token before it.
        for at in [64, 128, 86, 22] {
            let (before, behind) = (gate.narrow(1, 0, at), gate.narrow(1, at + 1, 149 - at));
            let gate = Tensor::cat(&[&before.unwrap(), &strong, &behind.unwrap()], 1).unwrap();
            inputs.args[GATE] = Some(gate);
            let want = case.expected(&inputs, [true; 3]).unwrap();
            let tracked = std::array::from_fn(|n| n != GATE);
            let graph = Graph { tracked, ..Graph::ALL };
            crate::kernels::check_against(&case, &inputs, &want, &[Mode::FusedChunk], graph);
        }
    }
}

/// Powers of two and not, 1, the largest, more columns than one block has, more rows than columns and fewer.
#[test]
fn head_sizes() {
    let sizes =
        [(1, 1), (1, 3), (3, 1), (17, 33), (33, 17), (64, 64), (64, 65), (65, 64), (128, 100), (100, 128)];
    for (i, (k, v)) in sizes.into_iter().enumerate() {
        for op in [Op::LinearAttn, Op::ADDITIVE[1 + i % 3], DELTA[i % 4]] {
            let case = Case { op, k, v, t: 66, h: 1, dtype: DTYPES[i % 3], ..Case::default() };
            check(&case, &[Mode::Recurrent, Mode::FusedChunk], Graph::ALL);
        }
    }
}

#[test]
fn large_head_sizes() {
    for (i, (k, v)) in [(128, 128), (256, 64), (33, 256), (129, 200), (256, 256)].into_iter().enumerate() {
        for op in [Op::LinearAttn, Op::SimpleGla, Op::Gla] {
            let dtype = DTYPES[(i + 1) % 3];
            check(&Case { op, k, v, dtype, t: 65, h: 1, ..Case::default() }, &[Mode::FusedChunk], Graph::ALL);
        }
        for op in [Op::LinearAttn, DELTA[i % 4], DELTA[(i + 1) % 4]] {
            let case = Case { op, k, v, t: 3, h: 1, dtype: DTYPES[i % 3], ..Case::default() };
            check(&case, &[Mode::Recurrent], Graph::ALL);
        }
    }
    let case = Case { normalize: true, k: 8, v: 256, t: 5, h: 1, ..Case::default() };
    check(&case, &[Mode::Recurrent, Mode::FusedChunk], Graph::ALL);
}

/// More rows of a state than a block has, K forwards and V for the gradients of keys: sums over parts of them.
#[test]
fn heads_wider_than_a_block() {
    for (i, (k, v)) in [(257, 20), (20, 257), (320, 640), (256, 512), (9, 300)].into_iter().enumerate() {
        for (j, op) in
            [Op::LinearAttn, Op::ADDITIVE[1 + i % 3], Op::ADDITIVE[1 + (i + 1) % 3]].into_iter().enumerate()
        {
            let dtype = DTYPES[(i + j) % 3];
            let case =
                Case { op, k, v, dtype, scale: SCALES[(i + j) % SCALES.len()], h: 1, ..Case::default() };
            check(&Case { t: 67, group: 1 + j % 2, ..case.clone() }, &[Mode::FusedChunk], Graph::ALL);
            check(&Case { t: 3, ..case.clone() }, &[Mode::Recurrent], Graph::ALL);
            if i < 2 {
                check(&Case { t: 270, ..case }, &[Mode::Chunk], Graph::ALL);
            }
        }
        if k <= 256 {
            let case = Case { op: DELTA[i % 4], k, v, dtype: DTYPES[i % 3], t: 66, h: 1, ..Case::default() };
            check(&case, &[Mode::Recurrent, Mode::FusedChunk], Graph::ALL);
        }
    }
    let ends = Some(vec![0, 0, 65, 65, 70]);
    for (op, dtype) in [(Op::Gla, DType::BF16), (Op::Gla, DType::F16), (Op::SimpleGla, DType::F32)] {
        let case =
            Case { op, dtype, k: 264, v: 136, t: 70, h: 1, cu_seqlens: ends.clone(), ..Case::default() };
        check(&case, &[Mode::FusedChunk, Mode::Chunk], Graph::ALL);
    }
    let case = Case { normalize: true, k: 300, v: 8, t: 66, h: 1, ..Case::default() };
    check(&case, &[Mode::Recurrent, Mode::FusedChunk], Graph::ALL);
    for (b, t) in [(2, 0), (0, 5)] {
        let case = Case { op: Op::Gla, k: 300, v: 300, b, t, ..Case::default() };
        check(&case, &MODES, Graph { loss: [false; 3], ..Graph::NONE });
    }
}

/// Two warpgroups have the rows of a state, and what they read of it they exchange; gradients take some rows at a time.
#[test]
fn delta_rules_of_wide_keys() {
    for (i, (k, v)) in [(256, 64), (136, 72), (200, 20), (129, 130)].into_iter().enumerate() {
        for op in [Op::DeltaRule, Op::GatedDeltaRule] {
            let gates = [Gates::Mild, Gates::Strong][i % 2];
            // In f16 only the gradients of keys are in chunks.
            let case = Case { op, k, v, dtype: DType::F16, t: 66, h: 1, ..Case::default() };
            check(&case, &[Mode::FusedChunk], Graph::ALL);
            let case = Case { op, gates, k, v, dtype: DType::BF16, h: 1, ..Case::default() };
            let (scale, group) = (SCALES[i % SCALES.len()], 1 + i % 2);
            check(&Case { t: 130, scale, group, ..case.clone() }, &[Mode::FusedChunk], Graph::ALL);
            if i < 2 {
                check(&Case { t: 590, ..case.clone() }, &[Mode::Chunk], Graph::ALL);
                let cu_seqlens = Some(vec![0, 0, 65, 65, 70, 135]);
                check(&Case { t: 135, cu_seqlens, ..case }, &[Mode::FusedChunk], Graph::ALL);
            }
        }
        for (op, k) in [(Op::Kda, k), (Op::Rwkv7, k / 2 + 1)] {
            let case = Case { op, k, v, dtype: DType::BF16, t: 66, h: 1, ..Case::default() };
            check(&case, &[Mode::FusedChunk], Graph::ALL);
        }
    }
}

/// The matrix form of their gradients has 128 columns at a time.
#[test]
fn delta_gradients_of_many_values() {
    for (i, (k, v)) in [(128, 256), (64, 200), (100, 129), (7, 250), (128, 131)].into_iter().enumerate() {
        for op in DELTA {
            for dtype in IN_CHUNKS {
                let case = Case { op, k, v, t: 70, h: 1, group: 1 + i % 2, dtype, ..Case::default() };
                check(&case, &[Mode::FusedChunk], Graph::ALL);
            }
        }
    }
    let ends = vec![0, 65, 65, 66];
    let case = Case {
        op: Op::Kda,
        k: 16,
        v: 136,
        t: 66,
        h: 1,
        dtype: DType::BF16,
        cu_seqlens: Some(ends),
        ..Case::default()
    };
    check(&case, &[Mode::FusedChunk], Graph::ALL);
}

#[test]
fn packed_sequences() {
    for case in operators() {
        for ends in [vec![0, 0, 65, 65, 70, 135], vec![0, 0], vec![0, 3, 3, 4, 4], vec![0, 300, 300, 301]] {
            let t = ends[ends.len() - 1] as usize;
            for dtype in [DType::F32, DType::BF16] {
                let case = Case { dtype, t, h: 1, group: 2, cu_seqlens: Some(ends.clone()), ..case.clone() };
                // Candle cannot sum an empty o, so then the loss sees the states alone.
                let loss = [t > 0, true, true];
                check(&case, &MODES, Graph { loss, ..Graph::ALL });
            }
        }
    }
}

#[test]
fn empty_batches_and_sequences() {
    for case in operators() {
        for (b, t) in [(2, 0), (0, 5), (0, 0)] {
            let case = Case { b, t, group: 2, k: 5, v: 3, ..case.clone() };
            let graph = Graph { loss: [false; 3], ..Graph::NONE };
            check(&case, &MODES, graph);
            if b > 0 {
                check(&case, &MODES, Graph { loss: [false, true, true], ..Graph::ALL });
            }
        }
    }
}

#[test]
fn gates_of_every_strength() {
    let kinds = [Gates::Strong, Gates::AllStrong, Gates::Forgets, Gates::Huge, Gates::Zero, Gates::Positive];
    for gates in kinds {
        for op in Op::GATED {
            for dtype in [DType::F32, DType::BF16] {
                let case = Case { op, gates, dtype, t: 135, h: 1, k: 17, v: 20, ..Case::default() };
                check(&case, &[Mode::Recurrent, Mode::Chunk, Mode::FusedChunk], Graph::ALL);
            }
        }
    }
}

/// Behind a decay of 0 nothing is left that it could change: its gradient is 0, and not what rounding leaves of a sum.
#[test]
fn a_decay_that_forgets_all_has_no_gradient() {
    for op in [Op::SimpleGla, Op::Gla, Op::GatedDeltaRule, Op::Kda, Op::Rwkv7] {
        for dtype in [DType::F32, DType::BF16] {
            let case =
                Case { op, dtype, gates: Gates::Forgets, t: 135, h: 1, k: 40, v: 24, ..Case::default() };
            let inputs = case.inputs().unwrap();
            let numbers = |x: &Option<Tensor>| -> Vec<f32> {
                x.as_ref().unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            let gates = numbers(&inputs.args[GATE]);
            assert!(gates.contains(&f32::NEG_INFINITY), "{case:?}");
            for mode in MODES {
                let grads = on_kernels(|device| {
                    let got = case.run(mode, &inputs.on(device).unwrap(), Graph::ALL).unwrap();
                    numbers(&got.grads[GATE])
                });
                for (i, (gate, grad)) in gates.iter().zip(&grads).enumerate() {
                    assert!(*gate > f32::NEG_INFINITY || *grad == 0., "{grad} at {i}, {mode:?} of {case:?}");
                }
            }
        }
    }
}

/// Segments are solved apart: a decay within one must reach those after it.
#[test]
fn gates_across_segments() {
    for gates in [Gates::Mild, Gates::Strong, Gates::Forgets] {
        for op in Op::GATED {
            for dtype in DTYPES {
                let case = Case { op, gates, dtype, t: 600, h: 1, k: 8, v: 8, b: 2, ..Case::default() };
                check(&case, &[Mode::Chunk, Mode::Auto], Graph::ALL);
            }
        }
    }
}

#[test]
fn each_loss_and_each_input_alone() {
    for case in operators() {
        let case = Case { t: 67, h: 1, group: 2, k: 8, v: 12, ..case };
        let losses = [[true, false, false], [false, true, false], [false, false, true], [false, true, true]];
        for loss in losses.into_iter().filter(|loss| case.normalize || !loss[2]) {
            check(&case, &[Mode::FusedChunk], Graph { loss, ..Graph::ALL });
            for only in 0..ARGS.len() {
                let tracked = std::array::from_fn(|i| i == only);
                check(&case, &[Mode::Chunk], Graph { loss, tracked, leaves: false });
            }
        }
        let no_state = Case { initial_state: false, ..case };
        check(&no_state, &MODES, Graph { loss: [true, false, false], ..Graph::ALL });
        check(&no_state, &MODES, Graph { loss: [true; 3], ..Graph::ALL });
    }
}

/// With a scale of 0 nothing comes from the outputs; with a tiny one, what does must not drown the states' gradient.
#[test]
fn scales_next_to_nothing() {
    // With a gradient of the last states, by which sweeps in reverse begin, and without.
    let all = [true; 3];
    let of_outputs = [true, false, false];
    for (scale, t, loss) in [
        (0., 67, all),
        (-0., 67, all),
        (1e-31, 67, all),
        (-1e-38, 67, all),
        (1e-39, 3, of_outputs),
        (1e-39, 67, of_outputs),
    ] {
        for op in [Op::LinearAttn, Op::Gla, Op::Kda, Op::Rwkv7] {
            let case = Case { op, scale: Some(scale), t, h: 1, ..Case::default() };
            let inputs = case.inputs().unwrap();
            let mut want = case.expected(&inputs, loss).unwrap();
            // Too small for the f32 that o and dq are.
            let nothing =
                |x: &mut Vec<f64>| x.iter_mut().for_each(|x| *x = if scale == 0. { *x } else { 0. });
            nothing(&mut want.outputs[0]);
            nothing(&mut want.grads[0]);
            let graph = Graph { loss, tracked: std::array::from_fn(|i| i < 5 && i != GATE), ..Graph::ALL };
            crate::kernels::check_against(&case, &inputs, &want, &MODES, graph);
        }
    }
}

#[test]
fn inputs_in_every_layout() {
    let small = Op::ALL.map(|op| Case { op, b: 2, t: 66, h: 1, group: 2, k: 9, v: 12, ..Case::default() });
    // In parts of their rows.
    let wide =
        [Op::LinearAttn, Op::Gla].map(|op| Case { op, t: 20, h: 1, k: 264, v: 130, ..Case::default() });
    for case in small.iter().chain(&wide) {
        for layout in layout::ALL {
            on_kernels(|device| {
                layout::check_on(device, case, layout, &[0, 1, 2, 3, 4, 5, 6, 7, 8], [2e-5; 2])
            });
        }
    }
}

/// Rows whose elements lie apart.
#[test]
fn delta_inputs_in_16_bits_apart() {
    for op in DELTA {
        for dtype in IN_CHUNKS {
            let case = Case { op, dtype, t: 66, h: 2, k: 16, v: 16, ..Case::default() };
            let mut inputs = case.inputs().unwrap();
            for x in inputs.args.iter_mut().flatten().filter(|x| x.rank() == 4 && x.dtype() == dtype) {
                *x = x.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
            }
            let want = case.expected(&inputs, [false; 3]).unwrap();
            on_kernels(|device| {
                let got = case.run(Mode::FusedChunk, &inputs.on(device)?, Graph::NONE)?;
                case.check_within(limits(dtype), &got, &want, Graph::NONE, &format!("{case:?}"))
            })
            .unwrap();
        }
    }
}

/// Rows of 16 bytes' multiples that begin elsewhere than at one.
#[test]
fn inputs_that_cannot_be_loaded_16_bytes_at_a_time() {
    for op in [Op::LinearAttn, Op::SimpleGla, Op::Gla, Op::GatedDeltaRule, Op::Rwkv7] {
        let case = Case { op, b: 1, t: 66, h: 2, k: 16, v: 16, ..Case::default() };
        for layout in [Layout::Window, Layout::Swapped(1, 2)] {
            for only in 0..ARGS.len() {
                on_kernels(|device| layout::check_on(device, &case, layout, &[only], [2e-5; 2]));
            }
        }
    }
}

#[test]
fn golden_cases() {
    for name in files::CASES {
        on_kernels(|device| files::check_on(device, name, [2e-5; 2]));
    }
}

#[test]
fn what_the_kernels_do_not_take_is_refused() {
    let error = on_kernels(|device| {
        let q = Tensor::zeros((1, 3, 1, 257), DType::F32, device)?;
        let beta = Tensor::zeros((1, 3, 1), DType::F32, device)?;
        delta_rule(&q, &q, &q, &beta, &Options::default())
    });
    let error = error.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("delta_rule: K is 257") && error.contains("up to 256"), "{error}");
}

/// A graph that was built on the kernels is differentiated there.
#[test]
fn gradients_of_a_plain_sum() {
    let x = on_kernels(|device| Tensor::ones((1, 70, 1, 8), DType::F32, device)).unwrap();
    let v = Var::from_tensor(&x).unwrap();
    let out = on_kernels(|_| linear_attn(&x, &x, &v, &Options::default().with_scale(1.))).unwrap().out;
    let grad = out.sum_all().unwrap().backward().unwrap().get(&v).unwrap().to_device(&Device::Cpu).unwrap();
    // Token s is read by itself and all after it, 8 times a key and query of ones.
    let want: Vec<f32> = (0..70 * 8).map(|i| 8. * (70 - i / 8) as f32).collect();
    assert_eq!(grad.flatten_all().unwrap().to_vec1::<f32>().unwrap(), want);
}

prop_compose! {
    fn cases()(
        op in select(Op::ALL.to_vec()),
        packed in prop::option::weighted(0.4, prop::collection::vec(select(vec![0u32, 1, 5, 16, 33, 64, 65]), 1..5)),
        (b, t) in (1..=2usize, select(LENGTHS.to_vec())),
        (h, group) in (1..=2usize, 1..=2usize),
        (k, v) in (select(vec![1usize, 3, 16, 17, 33, 64]), select(vec![1usize, 3, 16, 17, 33, 64])),
        scale in select(SCALES.to_vec()),
        gates in select(vec![Gates::Mild, Gates::Strong, Gates::Forgets, Gates::Zero]),
        (dtype, narrow_gate) in (select(DTYPES.to_vec()), any::<bool>()),
        normalize in prop::bool::weighted(0.4),
        initial_state: bool,
        seed: u64,
    ) -> Case {
        let ends = packed.map(|lengths| {
            let mut ends = vec![0];
            lengths.iter().for_each(|n| ends.push(ends[ends.len() - 1] + n));
            ends
        });
        let (b, t) = ends.as_ref().map_or((b, t), |ends: &Vec<u32>| (1, ends[ends.len() - 1] as usize));
        let case = Case {
            op, b, t, h, group, k, v, scale, gates, dtype, initial_state, seed,
            normalize: normalize && op == Op::LinearAttn,
            cu_seqlens: ends,
            gate_dtype: if narrow_gate { dtype } else { DType::F32 },
        };
        case.with_gradients_above_rounding()
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40,
        rng_seed: RngSeed::Fixed(48),
        failure_persistence: None,
        max_shrink_iters: 30,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_problems(case in cases(), mode in select(MODES.to_vec()), loss: [bool; 3], tracked: [bool; 9]) {
        let graph = Graph { loss: [loss[0] && case.t > 0, loss[1], loss[2]], tracked, leaves: true };
        check(&case, &[mode], graph);
    }
}
