//! How much memory a pass takes, about: one that cannot have it is refused. In f64, in which no product overflows.

use candle_core::{DType, Result, bail};

use super::plan::Task;
use super::sweep::SEGMENT;
use crate::memory;
use crate::options::Mode;
use crate::problem::{Problem, Role, Update};

/// Refuses a pass that needs so many bytes if they cannot be had.
pub(super) fn check(problem: &Problem, bytes: f64) -> Result<()> {
    if !memory::is_available(bytes) {
        let Problem { name, batch, tokens, v_heads, k_dim, v_dim, .. } = problem;
        bail!(
            "{name}: B = {batch}, T = {tokens}, HV = {v_heads}, K = {k_dim}, V = {v_dim} need about {} of memory, it must \
             be less than this machine has",
            memory::shown(bytes)
        );
    }
    Ok(())
}

/// Bytes that the forward pass allocates.
pub(super) fn forward(problem: &Problem) -> f64 {
    let out = bytes(problem.dtype, &problem.shape(Role::V));
    let states = bytes(DType::F32, &problem.shape(Role::Kv));
    let final_state = if problem.final_state { states } else { 0. };
    let (k, v) = (problem.k_dim, problem.v_dim);
    out + final_state + normalizer(problem) + tasks(problem, v) + sweep(problem, k, v)
}

/// What the backward pass of the delta families has beside that of the additive ones: what tokens write and its gradient,
/// the gradients of keys in f32, and the states that products start from.
fn delta(problem: &Problem) -> f64 {
    if problem.update == Update::Additive {
        return 0.;
    }
    let per_value = bytes(DType::F32, &problem.shape(Role::V));
    let per_key = bytes(DType::F32, &[problem.batch, problem.tokens, problem.v_heads, problem.k_dim]);
    let segments = problem.sequences.len() as f64 + (problem.batch * problem.tokens) as f64 / 64.;
    let states = 4. * segments * problem.v_heads as f64 * problem.k_dim as f64 * problem.v_dim as f64;
    2. * per_value + 4. * per_key + 2. * states
}

/// Bytes that the backward pass and what Candle does with its gradients allocate.
pub(super) fn backward(problem: &Problem, wants: &dyn Fn(Role) -> bool) -> f64 {
    let gate = wants(Role::G);
    let (k, v) = (problem.k_dim, problem.v_dim);
    let per_head = bytes(DType::F32, &[problem.batch, problem.tokens, problem.v_heads, k]);
    let keys = [Role::Q, Role::K].into_iter().filter(|role| gate || wants(*role)).count();
    let widened = gate || problem.v_heads > problem.k_heads;
    let roles = [Role::Q, Role::K, Role::V, Role::G, Role::Beta, Role::A, Role::B, Role::Kv, Role::Z]
        .into_iter()
        .filter(|role| wants(*role));
    let gradients: f64 = roles
        .map(|role| {
            let dtype = if matches!(role, Role::Kv | Role::Z) { DType::F32 } else { problem.dtype };
            bytes(dtype, &problem.shape(role))
        })
        .sum();
    // Candle adds each gradient to zeros.
    let mut all = 2. * gradients + if widened { keys as f64 * per_head } else { 0. };
    if gate {
        // A row of K at the end of each segment, and for each head in work the states there.
        let segments = longest(problem) / SEGMENT as f64 + 1.;
        all +=
            per_head / SEGMENT as f64 + threads().min(lanes(problem)) * segments * 4. * k as f64 * v as f64;
    }
    all + delta(problem)
        + normalizer(problem)
        + 4. * tasks(problem, k.max(v))
        + sweep(problem, v, k).max(sweep(problem, k, v))
}

fn bytes(dtype: DType, sizes: &[usize]) -> f64 {
    sizes.iter().fold(dtype.size_in_bytes() as f64, |product, &size| product * size as f64)
}

fn threads() -> f64 {
    rayon::current_num_threads() as f64
}

fn lanes(problem: &Problem) -> f64 {
    problem.sequences.len() as f64 * problem.v_heads as f64
}

fn longest(problem: &Problem) -> f64 {
    problem.sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0) as f64
}

/// The copies in f32, with one more column, that [`super::normalize`] makes of values, results and states.
fn normalizer(problem: &Problem) -> f64 {
    if !problem.normalize {
        return 0.;
    }
    let column = lanes(problem) * problem.k_dim as f64 * 4.;
    let values = bytes(DType::F32, &problem.shape(Role::V));
    2. * (2. * values + bytes(DType::F32, &problem.shape(Role::Kv)) + column)
}

fn tasks(problem: &Problem, cols: usize) -> f64 {
    lanes(problem) * cols.div_ceil(32) as f64 * size_of::<Task>() as f64
}

/// States, and rows of a block of tokens, of the tasks that run at a time.
fn sweep(problem: &Problem, rows: usize, cols: usize) -> f64 {
    let (rows, cols) = (rows as f64, cols as f64 + 32.);
    // As it came, in tiles, and in mode Chunk one for each chunk.
    let of_chunks = if problem.mode == Mode::Chunk { longest(problem) / chunk(problem) } else { 0. };
    let states = 3. + of_chunks;
    4. * (threads().min(lanes(problem)) * states * rows * cols + threads() * 512. * (rows + cols))
}

/// Tokens for each state that mode Chunk keeps.
fn chunk(problem: &Problem) -> f64 {
    match problem.update {
        Update::Additive => 64.,
        Update::Delta | Update::LowRank => (problem.k_dim / 2).clamp(1, 64) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::problem::Decay;
    use candle_core::{Device, Tensor};

    fn problem(tokens: usize, heads: usize, k: usize, v: usize, opts: &Options) -> Problem {
        let x = Tensor::zeros((1, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
        let [q, v] = [k, v].map(|dim| x.broadcast_as((1, tokens, heads, dim)).unwrap());
        Problem::new("linear_attn", [&q, &q, &v], (Decay::None, Update::Additive), &[], opts).unwrap().0
    }

    const GIB: f64 = (1u64 << 30) as f64;

    #[test]
    fn every_part_of_a_pass_counts() {
        let none = Options::default();
        assert!(forward(&problem(1 << 20, 1 << 11, 128, 128, &none)) >= 1024. * GIB);
        // A state.
        assert!(forward(&problem(1, 1, 1 << 20, 1 << 20, &none)) >= 4096. * GIB);
        assert!(forward(&problem(1, 1, 1 << 50, 1, &none)) >= 4096. * GIB);
        // The states of all chunks.
        let (fused, chunk) = (none.clone().with_mode(Mode::FusedChunk), none.clone().with_mode(Mode::Chunk));
        assert!(forward(&problem(1 << 26, 1, 256, 256, &chunk)) >= 256. * GIB);
        assert!(forward(&problem(1 << 26, 1, 256, 256, &fused)) <= 80. * GIB);
        // The final states, and the copies of the normalised form.
        let wide = problem(1, 1 << 20, 256, 256, &none.clone().with_final_state(true));
        assert!(forward(&wide) >= 256. * GIB);
        let normalized = none.clone().with_normalize(true);
        assert!(forward(&problem(1 << 20, 64, 1, 256, &normalized)) >= 3. * 64. * GIB);
        // No tokens, but a task for each head.
        assert!(forward(&problem(0, 1 << 40, 1, 1, &none)) >= 4096. * GIB);
    }

    #[test]
    fn the_gradients_that_are_wanted_count() {
        let problem = problem(1 << 20, 1 << 11, 128, 1, &Options::default());
        assert!(forward(&problem) < 9. * GIB);
        assert!(backward(&problem, &|role| role == Role::V) < 40. * GIB);
        assert!(backward(&problem, &|role| role == Role::Q) >= 1024. * GIB);
        assert!(backward(&problem, &|role| role == Role::Q) < backward(&problem, &|_| true));
    }

    #[test]
    fn an_ordinary_problem_is_not_refused() {
        for mode in [Mode::Auto, Mode::Recurrent, Mode::Chunk, Mode::FusedChunk] {
            let problem = problem(16384, 16, 128, 128, &Options::default().with_mode(mode));
            check(&problem, forward(&problem)).unwrap();
            check(&problem, backward(&problem, &|_| true)).unwrap();
        }
    }
}
