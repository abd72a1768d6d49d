//! What tests of the kernels have in common, wherever these run.

use crate::case::{ARGS, Case, GATE, Inputs, Op};
use crate::compare::{Expected, Limits, norm, values};
use crate::on_kernels;
use crate::run::Graph;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::Mode;

/// What a token writes depends on the state.
pub const DELTA: [Op; 4] = [Op::DeltaRule, Op::GatedDeltaRule, Op::Kda, Op::Rwkv7];

/// The dtypes in which the delta families go in chunks.
pub const IN_CHUNKS: [DType; 2] = [DType::BF16, DType::F16];

/// How closely the kernels must agree. States and f32 gradients of 16-bit inputs are sums of products that were rounded.
pub fn limits(dtype: DType) -> Limits {
    let (out, grad) = match dtype {
        DType::BF16 => (2.5e-3, 5e-3),
        DType::F16 => (5e-4, 1e-3),
        _ => (2e-5, 2e-5),
    };
    Limits { out, state: out, grad, f32_grad: grad }
}

/// Runs `case` on the kernels in each of `modes` and holds what comes out against the definition.
pub fn check(case: &Case, modes: &[Mode], graph: Graph) {
    let inputs = case.inputs().unwrap();
    let want = case.expected(&inputs, graph.loss).unwrap();
    check_against(case, &inputs, &want, modes, graph);
}

/// Runs `case` on the kernels in each of `modes` and holds what comes out against `want`.
pub fn check_against(case: &Case, inputs: &Inputs, want: &Expected, modes: &[Mode], graph: Graph) {
    let mut want = want.clone();
    if !case.initial_state {
        want.grads[4].clear();
    }
    if !(case.initial_state && case.normalize) {
        want.grads[5].clear();
    }
    for &mode in modes {
        let label = format!("{mode:?} of {case:?} with {graph:?}");
        on_kernels(|device| {
            // Candle makes no gradient for an empty tensor on a GPU: it cannot allocate one.
            let empty = case.b * case.t == 0 && device.is_cuda();
            let graph = if empty { Graph { loss: [false; 3], ..Graph::NONE } } else { graph };
            let got = case.run(mode, &inputs.on(device)?, graph)?;
            case.check_within(limits(case.dtype), &got, &want, graph, &label)
        })
        .unwrap_or_else(|e| panic!("{label}: {e}"));
    }
}

/// What the CPU backend makes of the same numbers in f32: for problems that are too large for the definition.
pub fn by_cpu(case: &Case, inputs: &Inputs, graph: Graph) -> Result<Expected> {
    let wide = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_dtype(DType::F32)).transpose();
    let mut inputs = inputs.clone();
    for x in inputs.args.iter_mut().chain(&mut inputs.cotangents) {
        *x = wide(x)?;
    }
    let case = Case { dtype: DType::F32, gate_dtype: DType::F32, ..case.clone() };
    let got = case.run(Mode::Auto, &inputs, graph)?;
    let flat = |x: &Option<Tensor>| x.as_ref().map_or_else(|| Ok(Vec::new()), values);
    let mut want = Expected { outputs: Default::default(), grads: Default::default(), gate_terms: 0. };
    for i in 0..3 {
        want.outputs[i] = flat(&got.outputs[i])?;
    }
    for i in 0..ARGS.len() {
        want.grads[i] = flat(&got.grads[i])?;
    }
    want.gate_terms = gate_terms(&case, &inputs, graph)?;
    Ok(want)
}

/// The norm of what the gate's gradient is summed up from, one number a token and channel: the gradient of a gate that each
/// channel has for itself.
fn gate_terms(case: &Case, inputs: &Inputs, graph: Graph) -> Result<f64> {
    let Some(gate) = &inputs.args[3] else { return Ok(0.) };
    let shape = (case.b, case.t, case.hv(), case.k);
    let (op, gate) = match case.op {
        Op::Retention => (Op::Gla, gate.reshape((1, 1, case.hv(), 1))?.broadcast_as(shape)?),
        Op::SimpleGla => (Op::Gla, gate.unsqueeze(3)?.broadcast_as(shape)?),
        Op::GatedDeltaRule => (Op::Kda, gate.unsqueeze(3)?.broadcast_as(shape)?),
        op => (op, gate.clone()),
    };
    let mut inputs = inputs.clone();
    inputs.args[3] = Some(gate.contiguous()?);
    let only_gate = Graph { tracked: std::array::from_fn(|i| i == GATE), ..graph };
    let got = Case { op, ..case.clone() }.run(Mode::Auto, &inputs, only_gate)?;
    got.grads[3].as_ref().map_or(Ok(0.), |grad| Ok(norm(&values(grad)?)))
}
