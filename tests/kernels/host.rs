//! What only kernels on the host can be asked: how a GPU's size and the order of its threads change what they compute.

use crate::case::{Case, Op};
use crate::convolutions::{Convolution, DTYPES, Lies};
use crate::kernels::{DELTA, IN_CHUNKS, check, limits};
use crate::norms::{KINDS, Norm};
use crate::pointwise::{Kind, Pointwise};
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Result, Tensor};
use candle_linear_attn::{Mode, Options, cuda_host, delta_rule};

fn outcome(case: &Case, mode: Mode) -> Vec<Vec<u32>> {
    let inputs = case.inputs().unwrap();
    let got = case.run(mode, &inputs, Graph::ALL).unwrap();
    got.outputs.iter().chain(&got.grads).flatten().map(bits).collect()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let numbers: Vec<f32> = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

/// Convolutions, norms and decays whose blocks share sums, of rows in a part of a warp and in several.
fn layers() -> (Vec<Convolution>, Vec<Norm>, Vec<Pointwise>) {
    let conv = |(dtype, width)| Convolution { dtype, width, tokens: 130, ..Default::default() };
    let convolutions = [(DType::F32, 4), (DType::BF16, 3), (DType::F16, 7)].map(conv);
    let norm = |kind| [vec![700, 24], vec![30, 2000]].map(|dims| Norm { kind, dims, ..Default::default() });
    let decay = |dims| Pointwise { kind: Kind::Decay(4), dims, dtype: DType::BF16, ..Default::default() };
    let decays = [vec![700, 24], vec![30, 200]].map(decay).to_vec();
    (convolutions.to_vec(), KINDS.into_iter().flat_map(norm).collect(), decays)
}

/// A barrier that is missing shows when other threads go first.
#[test]
fn the_order_of_the_threads_changes_nothing() {
    for op in Op::ALL {
        let mut sizes = vec![(DType::F32, 20, 40), (DType::BF16, 64, 72), (DType::BF16, 40, 48)];
        if [Op::DeltaRule, Op::GatedDeltaRule].contains(&op) {
            sizes.push((DType::BF16, 136, 72));
        }
        sizes.extend([(DType::F16, 64, 72), (DType::F16, 128, 72)]);
        if Op::ADDITIVE.contains(&op) {
            sizes.push((DType::F32, 128, 72));
        }
        for (dtype, k, v) in sizes {
            let case = Case { op, dtype, t: 130, h: 1, k, v, ..Case::default() };
            for mode in [Mode::Recurrent, Mode::FusedChunk, Mode::Chunk] {
                let run = |seed| {
                    cuda_host::order(seed);
                    let got = cuda_host::run(|| outcome(&case, mode));
                    cuda_host::order(0);
                    got
                };
                let first = run(0);
                for seed in [1, 2, 3] {
                    assert_eq!(run(seed), first, "order {seed}, {mode:?} of {case:?}");
                }
            }
        }
    }
}

#[test]
fn the_order_of_the_threads_changes_nothing_in_layers() {
    let (convolutions, norms, decays) = layers();
    let run = |seed| {
        cuda_host::order(seed);
        // So few multiprocessors that a block has several rows of the largest, one after the other.
        let got: Vec<_> = cuda_host::run_on(1, 227 << 10, || {
            let convolutions = convolutions.iter().map(|c| c.run(&c.numbers()?, &Device::Cpu));
            let norms = norms.iter().map(|n| n.run(&n.numbers()?, &Device::Cpu));
            let decays = decays.iter().map(|d| d.run(&d.numbers()?, &Device::Cpu));
            convolutions.chain(norms).chain(decays).collect::<Result<_>>()
        })
        .unwrap();
        cuda_host::order(0);
        got.iter().flatten().flatten().map(bits).collect::<Vec<_>>()
    };
    let first = run(0);
    for seed in [1, 2, 3] {
        assert!(run(seed) == first, "order {seed}");
    }
}

/// The fewer multiprocessors, the longer the pieces of a convolution and the more rows a block of a norm or decay goes over.
#[test]
fn any_number_of_multiprocessors_gives_the_same_layers() -> Result<()> {
    let (mut convolutions, norms, decays) = layers();
    let cu_seqlens = Some(vec![0, 1, 60, 64, 64, 129, 300, 300]);
    convolutions.push(Convolution { batch: 1, tokens: 300, cu_seqlens, ..Default::default() });
    for (dtype, lies) in DTYPES.into_iter().zip([Lies::Contiguous, Lies::Swapped, Lies::Window(5)]) {
        convolutions.push(Convolution { channels: 300, tokens: 600, dtype, lies, ..Default::default() });
    }
    for multiprocessors in [1, 2, 20] {
        for case in &convolutions {
            let numbers = case.numbers()?;
            let run = || case.run(&numbers, &Device::Cpu);
            let got = cuda_host::run_on(multiprocessors, 227 << 10, run)?;
            case.compare(&numbers, &got).unwrap_or_else(|e| panic!("{multiprocessors}, {case:?}: {e}"));
        }
        for case in &norms {
            let numbers = case.numbers()?;
            let run = || case.run(&numbers, &Device::Cpu);
            let got = cuda_host::run_on(multiprocessors, 227 << 10, run)?;
            case.compare(&numbers, &got).unwrap_or_else(|e| panic!("{multiprocessors}, {case:?}: {e}"));
        }
        for case in &decays {
            let numbers = case.numbers()?;
            let run = || case.run(&numbers, &Device::Cpu);
            let got = cuda_host::run_on(multiprocessors, 227 << 10, run)?;
            case.compare(&numbers, &got).unwrap_or_else(|e| panic!("{multiprocessors}, {case:?}: {e}"));
        }
    }
    Ok(())
}

/// 99 KB is what an RTX 40 has, 163 KB an A100; with 40 KB little is left but going token by token.
#[test]
fn less_shared_memory_gives_the_same() -> Result<()> {
    for bytes in [99 << 10, 163 << 10, 40 << 10] {
        let additive = [Op::LinearAttn, Op::SimpleGla, Op::Gla].into_iter().flat_map(|op| {
            [(DType::BF16, 128, 128), (DType::F32, 64, 100), (DType::BF16, 264, 72)].map(|size| (op, size))
        });
        let delta = [(Op::DeltaRule, 128), (Op::GatedDeltaRule, 64), (Op::Kda, 64), (Op::Rwkv7, 64)];
        let delta = delta.map(|(op, k)| (op, (DType::F16, k, 72)));
        for (op, (dtype, k, v)) in additive.chain(delta) {
            let case = Case { op, dtype, t: 66, h: 1, k, v, ..Case::default() };
            let inputs = case.inputs()?;
            let want = case.expected(&inputs, [true; 3])?;
            let got = cuda_host::run_on(132, bytes, || case.run(Mode::FusedChunk, &inputs, Graph::ALL))?;
            case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &format!("{bytes}, {case:?}"))?;
        }
    }
    Ok(())
}

/// The kernels that have room for little else than a chunk: every size that they come in, several chunks, packed sequences.
#[test]
fn kernels_with_99_kilobytes() -> Result<()> {
    for op in [Op::LinearAttn, Op::SimpleGla, Op::DeltaRule, Op::GatedDeltaRule] {
        for (k, v) in [(128, 128), (128, 40), (40, 64), (64, 128), (144, 40)] {
            let cu_seqlens = (k == v).then(|| vec![0, 130, 130, 200]);
            let case = Case { op, k, v, t: 200, h: 1, cu_seqlens, dtype: DType::BF16, ..Case::default() };
            let case = Case { scale: Some(-0.7), ..case };
            let inputs = case.inputs()?;
            let want = case.expected(&inputs, [true; 3])?;
            for mode in [Mode::FusedChunk, Mode::Chunk] {
                let got = cuda_host::run_on(4, 99 << 10, || case.run(mode, &inputs, Graph::ALL))?;
                case.check_within(
                    limits(DType::BF16),
                    &got,
                    &want,
                    Graph::ALL,
                    &format!("{mode:?}, {case:?}"),
                )?;
            }
        }
    }
    Ok(())
}

/// Auto divides a sequence among as many multiprocessors as there are.
#[test]
fn any_number_of_multiprocessors_gives_the_same() -> Result<()> {
    for op in Op::ALL {
        let case = Case { op, t: 900, h: 1, k: 5, v: 6, ..Case::default() };
        let inputs = case.inputs()?;
        let want = case.expected(&inputs, [true; 3])?;
        for multiprocessors in [1, 2, 3, 100] {
            let run = || case.run(Mode::Auto, &inputs, Graph::ALL);
            let got = cuda_host::run_on(multiprocessors, 227 << 10, run)?;
            let label = format!("{multiprocessors}, {case:?}");
            case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &label)?;
        }
    }
    Ok(())
}

/// Token by token, tokens come eight at a time and a block has up to 64 columns, of which the last ones of V may have few; of
/// very few tokens additive sweeps have a kernel of their own, which may also get sequences that are longer than the others.
#[test]
fn token_by_token_in_groups_and_tiles() -> Result<()> {
    let singles: Vec<u32> = (0..=20).chain([33, 33, 62]).collect();
    let lengths = [(70, None), (8, None), (5, None), (4, None), (62, Some(singles))];
    for (n, op) in Op::ALL.into_iter().enumerate() {
        for (i, (t, cu_seqlens)) in lengths.iter().enumerate() {
            // Rows that are copied four elements at a time, and that are not.
            let (k, v) = [(100, 132), (17, 66)][(n + i) % 2];
            let dtype = [DType::BF16, DType::F16, DType::F32][(n + i) % 3];
            let cu_seqlens = cu_seqlens.clone();
            let case =
                Case { op, dtype, k, v, t: *t, h: 2, cu_seqlens, scale: Some(-0.37), ..Case::default() };
            let inputs = case.inputs()?;
            let want = case.expected(&inputs, [true; 3])?;
            let got = case.run(Mode::Recurrent, &inputs, Graph::ALL)?;
            case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &format!("{case:?}"))?;
        }
    }
    Ok(())
}

/// Where there are enough blocks for all multiprocessors, those of the chunked delta kernels are twice as wide.
#[test]
fn wide_blocks_of_the_chunked_delta_kernels() -> Result<()> {
    for op in [Op::DeltaRule, Op::GatedDeltaRule, Op::Kda] {
        // Rows that go by elements, and in whole pieces.
        for (k, v) in [(16, 70), (100, 130), (64, 136)] {
            let case = Case { op, k, v, t: 135, scale: Some(-0.37), dtype: DType::BF16, ..Case::default() };
            let inputs = case.inputs()?;
            let want = case.expected(&inputs, [true; 3])?;
            let run = || case.run(Mode::FusedChunk, &inputs, Graph::ALL);
            let got = cuda_host::run_on(1, 227 << 10, run)?;
            case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &format!("{case:?}"))?;
        }
    }
    Ok(())
}

/// Where they are few, blocks of the chunked delta kernels share a sequence in time, in spans of which short sequences have none.
/// A span may be done before those that precede it, and has its rows moved in pieces or by elements.
#[test]
fn spans_of_the_chunked_delta_kernels() -> Result<()> {
    for (n, op) in DELTA.into_iter().enumerate() {
        let mut sizes = vec![
            (0, 132, 16, 72, DType::BF16),
            (1, 132, 100, 130, DType::BF16),
            (2, 1, 70, 40, DType::BF16),
            (1, 132, 100, 130, DType::F16),
            (2, 132, 16, 72, DType::F16),
        ];
        if [Op::DeltaRule, Op::GatedDeltaRule].contains(&op) {
            sizes.push((3, 132, 200, 40, DType::BF16));
        }
        for (order, multiprocessors, k, v, dtype) in sizes {
            let cu_seqlens = (n % 2 == 0).then(|| vec![0, 0, 64, 600, 600, 601, 1130]);
            // Even, or a and b are in f32, which go token by token.
            let seed = 2 * n as u64;
            let case = Case { op, k, v, seed, cu_seqlens, h: 1, dtype, ..Case::default() };
            let case = Case { t: 1130, scale: Some(-0.37), ..case };
            let inputs = case.inputs()?;
            let want = case.expected(&inputs, [true; 3])?;
            let run = || case.run(Mode::Chunk, &inputs, Graph::ALL);
            cuda_host::order(order);
            let got = cuda_host::run_on(multiprocessors, 227 << 10, run)?;
            cuda_host::order(0);
            case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &format!("{order}, {case:?}"))?;
        }
    }
    Ok(())
}

/// Spans of [`Mode::Chunk`] have four segments. Auto divides these 25 among five spans, every other of which begins with an odd one.
#[test]
fn auto_divides_the_chunked_delta_kernels_in_odd_spans() -> Result<()> {
    for (op, dtype) in DELTA.into_iter().flat_map(|op| IN_CHUNKS.map(|dtype| (op, dtype))) {
        let case = Case { op, k: 16, v: 40, t: 1590, h: 1, dtype, ..Case::default() };
        let inputs = case.inputs()?;
        let want = case.expected(&inputs, [true; 3])?;
        let got = cuda_host::run(|| case.run(Mode::Auto, &inputs, Graph::ALL))?;
        case.check_within(limits(case.dtype), &got, &want, Graph::ALL, &format!("{case:?}"))?;
    }
    Ok(())
}

/// A delta rule with K = 300 is refused by the kernels and not by the CPU backend: which of them is at work shows.
#[test]
fn the_kernels_are_for_the_thread_and_time_that_asked_for_them() {
    let x = Tensor::ones((1, 2, 1, 300), DType::F32, &Device::Cpu).unwrap();
    let beta = Tensor::ones((1, 2, 1), DType::F32, &Device::Cpu).unwrap();
    let on_cpu = || delta_rule(&x, &x, &x, &beta, &Options::default()).is_ok();
    assert!(on_cpu());
    cuda_host::run(|| {
        assert!(!on_cpu());
        std::thread::scope(|scope| assert!(scope.spawn(on_cpu).join().unwrap()));
        cuda_host::run(|| assert!(!on_cpu()));
        assert!(!on_cpu());
    });
    assert!(on_cpu());
    let panicked = std::panic::catch_unwind(|| cuda_host::run(|| panic!("as a failing test does")));
    assert!(panicked.is_err());
    assert!(on_cpu());
}

/// Several threads may run kernels at the same time.
#[test]
fn threads_do_not_meet() {
    std::thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || {
                for op in Op::ALL {
                    check(&Case { op, seed, t: 67, h: 1, ..Case::default() }, &MODES, Graph::ALL);
                }
            });
        }
    });
}
