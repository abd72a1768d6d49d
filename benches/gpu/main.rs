//! The operators on a GPU, beside the copy rate of the same card and, with `--fla`, flash-linear-attention in Python.
//!
//! `cargo bench --features cuda --bench gpu` prints one table. `-- --only simple_gla` runs the lines that contain the words,
//! `-- --fla` needs a python3 with torch, triton and fla, whose autotuning takes minutes, and adds its times and the ratios.

#[path = "../common/given.rs"]
mod given;
mod graph;
mod peer;
mod timing;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_linear_attn::{Mode, Options, Output, State, gla, linear_attn, retention, simple_gla};
use candle_linear_attn::{delta_rule, gated_delta_rule, kda, keep_freed_memory, rwkv7};
use clap::Parser;
use timing::Clock;

#[derive(Parser)]
struct Args {
    /// Only lines whose description contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Also time flash-linear-attention on the same shapes: `both` is forward and backward, of ours with Candle's sums.
    #[arg(long)]
    fla: bool,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Linear,
    Retention,
    SimpleGla,
    Gla,
    Delta,
    GatedDelta,
    Kda,
    Rwkv7,
}

impl Op {
    const ALL: [Self; 8] = [
        Self::Linear,
        Self::Retention,
        Self::SimpleGla,
        Self::Gla,
        Self::Delta,
        Self::GatedDelta,
        Self::Kda,
        Self::Rwkv7,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear_attn",
            Self::Retention => "retention",
            Self::SimpleGla => "simple_gla",
            Self::Gla => "gla",
            Self::Delta => "delta_rule",
            Self::GatedDelta => "gated_delta_rule",
            Self::Kda => "kda",
            Self::Rwkv7 => "rwkv7",
        }
    }
}

/// B, T, H, D.
type Shape = [usize; 4];

const SHAPES: [Shape; 6] = [
    [4, 4096, 64, 128],
    [1, 8192, 96, 128],
    [2, 16384, 16, 128],
    [4, 2048, 16, 128],
    [8, 1024, 8, 64],
    [1, 32768, 16, 128],
];

/// B, T, H, K, V: heads as wide as those of flash-linear-attention's larger models.
const WIDE_SHAPES: [[usize; 5]; 2] = [[8, 4096, 4, 256, 256], [8, 4096, 4, 256, 512]];

/// Shapes for which others publish a gated delta rule, beside the last of [`SHAPES`].
const DELTA_SHAPES: [Shape; 1] = [[8, 4096, 32, 128]];

struct Problem {
    op: Op,
    qkv: [Var; 3],
    gate: Option<Var>,
    /// beta, or a and b.
    of_delta: Vec<Var>,
}

impl Problem {
    fn new(op: Op, [b, t, h, d, v]: [usize; 5], dtype: DType, device: &Device) -> Result<Self> {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, device);
        let input = |d| Ok::<_, anyhow::Error>(Var::from_tensor(&random(&[b, t, h, d])?.to_dtype(dtype)?)?);
        // As gated models have them: most a few hundredths a token.
        let gate = |shape: &[usize], dtype| random(shape)?.abs()?.affine(-0.05, 0.)?.to_dtype(dtype);
        let gate = match op {
            Op::Linear | Op::Delta => None,
            Op::Retention => Some(gate(&[h], DType::F32)?),
            Op::SimpleGla | Op::GatedDelta => Some(gate(&[b, t, h], DType::F32)?),
            Op::Gla | Op::Kda | Op::Rwkv7 => Some(gate(&[b, t, h, d], dtype)?),
        };
        // Keys of length 1, as models with a delta rule have them: longer ones would make the state grow without bound.
        let unit = |factor| {
            let x = random(&[b, t, h, d])?;
            let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
            let x = x.broadcast_div(&norm)?.affine(factor, 0.)?;
            Ok::<_, anyhow::Error>(Var::from_tensor(&x.to_dtype(dtype)?)?)
        };
        let of_delta = match op {
            Op::Delta | Op::GatedDelta | Op::Kda => {
                vec![Var::from_tensor(&Tensor::rand(0f32, 1., (b, t, h), device)?.to_dtype(dtype)?)?]
            }
            Op::Rwkv7 => vec![unit(1.)?, unit(-0.5)?],
            _ => vec![],
        };
        let k = if of_delta.is_empty() { input(d)? } else { unit(1.)? };
        Ok(Self {
            op,
            qkv: [input(d)?, k, input(v)?],
            gate: gate.map(|g| Var::from_tensor(&g)).transpose()?,
            of_delta,
        })
    }

    fn run(&self, opts: &Options) -> Result<Output> {
        let [q, k, v] = self.qkv.each_ref().map(|x| x.as_tensor());
        let gate = || self.gate.as_ref().context("a gate");
        let extra = |i| self.of_delta.get(i).map(Var::as_tensor).context("beta, or a and b");
        Ok(match self.op {
            Op::Linear => linear_attn(q, k, v, opts)?,
            Op::Retention => retention(q, k, v, gate()?, opts)?,
            Op::SimpleGla => simple_gla(q, k, v, gate()?, opts)?,
            Op::Gla => gla(q, k, v, gate()?, opts)?,
            Op::Delta => delta_rule(q, k, v, extra(0)?, opts)?,
            Op::GatedDelta => gated_delta_rule(q, k, v, gate()?, extra(0)?, opts)?,
            Op::Kda => kda(q, k, v, gate()?, extra(0)?, opts)?,
            Op::Rwkv7 => rwkv7(q, k, v, extra(0)?, extra(1)?, gate()?, opts)?,
        })
    }

    /// The bytes of what goes in.
    fn bytes(&self) -> usize {
        let of = |x: &Var| x.elem_count() * x.dtype().size_in_bytes();
        self.qkv.iter().chain(&self.gate).chain(&self.of_delta).map(of).sum()
    }
}

/// A line of the table.
#[derive(Clone, Copy)]
struct Line {
    op: Op,
    /// B, T, H, K, V.
    shape: [usize; 5],
    dtype: DType,
    mode: Mode,
}

impl Line {
    fn label(&self) -> String {
        let [b, t, h, k, v] = self.shape;
        let d = if k == v { k.to_string() } else { format!("{k} x {v}") };
        format!("| {} | {b}, {t}, {h}, {d} | {} | {:?} |", self.op.name(), self.dtype.as_str(), self.mode)
    }

    fn all() -> Vec<Self> {
        let square = |[b, t, h, d]: Shape| [b, t, h, d, d];
        let line = |op, shape| Self { op, shape, dtype: DType::BF16, mode: Mode::Auto };
        let mut lines = Vec::new();
        for op in Op::ALL {
            lines.extend(SHAPES.map(|shape| line(op, square(shape))));
        }
        for dtype in [DType::F16, DType::F32] {
            lines.extend(Op::ALL.map(|op| Self { dtype, ..line(op, square(SHAPES[0])) }));
        }
        for op in Op::ALL {
            lines.extend(WIDE_SHAPES.map(|shape| line(op, shape)));
        }
        for op in [Op::GatedDelta, Op::Kda] {
            lines.extend(DELTA_SHAPES.map(|shape| line(op, square(shape))));
        }
        lines.extend(
            [Mode::Chunk, Mode::FusedChunk].map(|mode| Self { mode, ..line(Op::Linear, square(SHAPES[5])) }),
        );
        lines
    }

    /// Its columns behind the label.
    fn measure(&self, clock: &Clock, device: &Device, rate: f64) -> Result<Measured> {
        let problem = Problem::new(self.op, self.shape, self.dtype, device)?;
        let opts = Options::default().with_mode(self.mode);
        let forward = clock.median(|| problem.run(&opts))?;
        let out = problem.run(&opts)?.out;
        let bytes = problem.bytes() + out.elem_count() * self.dtype.size_in_bytes();
        let of_rate = bytes as f64 / (forward * 1e-3) / rate;
        let grad = Tensor::randn(0f32, 1., out.shape(), device)?.to_dtype(self.dtype)?;
        let loss = graph::with_gradient(&out, &grad)?;
        let backward = clock.median(|| Ok(loss.backward()?))?;
        let free = graph::with_gradient(&graph::free(problem.qkv.each_ref())?, &grad)?;
        let sums = clock.median(|| Ok(free.backward()?))?;
        Ok(Measured { forward, of_rate, backward, sums })
    }
}

/// Milliseconds; `of_rate` is the part of the copy rate, `sums` what of `backward` is Candle's.
struct Measured {
    forward: f64,
    of_rate: f64,
    backward: f64,
    sums: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::new_cuda(0).context("this bench needs a GPU")?;
    keep_freed_memory(&device)?;
    let clock = Clock::new(&device)?;
    let rate = clock.copy_rate()?;
    println!("{}: a copy within its memory moves {:.2} TB/s, reads plus writes", clock.card()?, rate / 1e12);
    println!();
    let lines: Vec<Line> = Line::all().into_iter().filter(|line| line.label().contains(&args.only)).collect();
    let mut header = String::from(
        "| operator | B, T, H, D (or K x V) | dtype | mode | forward, ms | of the copy rate | backward, ms | with Candle's sums, ms |",
    );
    if args.fla {
        header += " FLA forward, ms | times as fast | FLA both, ms | times as fast |";
    }
    println!("{header}");
    println!("|{}", " --- |".repeat(header.matches('|').count() - 1));
    for line in lines {
        let Measured { forward, of_rate, backward, sums } = line.measure(&clock, &device, rate)?;
        print!(
            "{} {forward:.3} | {:.0}% | {:.3} | {backward:.3} |",
            line.label(),
            100. * of_rate,
            backward - sums
        );
        if args.fla {
            let theirs = if line.mode == Mode::Auto { peer::times(&line)? } else { peer::Times::default() };
            for (theirs, ours) in [(theirs.forward, forward), (theirs.both, forward + backward)] {
                match theirs {
                    Some(theirs) => print!(" {theirs:.3} | {:.2} |", theirs / ours),
                    None => print!(" | |"),
                }
            }
        }
        println!();
    }
    println!();
    println!("| decode, T = 1 | B, H, D | ms | of the copy rate |");
    println!("| --- | --- | --- | --- |");
    for op in Op::ALL {
        for (b, h, d) in [(64, 32, 128), (1, 32, 128), (64, 32, 64)] {
            decode(&args, &clock, &device, rate, op, (b, h, d))?;
        }
    }
    Ok(())
}

fn decode(
    args: &Args,
    clock: &Clock,
    device: &Device,
    rate: f64,
    op: Op,
    (b, h, d): (usize, usize, usize),
) -> Result<()> {
    let what = format!("| decode {} | {b}, {h}, {d} |", op.name());
    if !what.contains(&args.only) {
        return Ok(());
    }
    let problem = Problem::new(op, [b, 1, h, d, d], DType::BF16, device)?;
    let state = State { kv: Tensor::randn(0f32, 1., (b, h, d, d), device)?, z: None };
    let opts = Options::default().with_initial_state(&state).with_final_state(true);
    let time = clock.median(|| problem.run(&opts))?;
    let bytes = 2 * state.kv.elem_count() * 4 + problem.bytes();
    println!("{what} {time:.4} | {:.0}% |", 100. * bytes as f64 / (time * 1e-3) / rate);
    Ok(())
}
