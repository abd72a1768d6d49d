//! A sweep (see `cuda/cla.h`), from its tensors to the kernels' launches.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;

use candle_core::{DType, Result, Tensor, bail};

use super::ffi::{self, Gate};
use super::machine::Machine;
use super::memory::{Addresses, Buffer, Held};
use super::route::{self, Card, Route, Size, row_parts};
use crate::options::Mode;
use crate::problem::{Decay, Problem, Sequence};

/// One forward or backward pass on a device.
pub(super) struct Pass<'a> {
    pub problem: &'a Problem,
    pub machine: Machine,
    pub cu_seqlens: Option<Tensor>,
    pub longest: usize,
    pub card: Card,
}

impl<'a> Pass<'a> {
    /// Gets ready for `problem` on the device of `q`; refuses what the kernels do not take.
    pub fn new(problem: &'a Problem, q: &Tensor) -> Result<Self> {
        let machine = Machine::of(q.device())?;
        let card = machine.card()?;
        let longest = problem.sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
        let states = problem.sequences.len().saturating_mul(problem.v_heads);
        route::check(problem.name, &card, problem.update, [problem.k_dim, problem.v_dim], states, longest)?;
        let whole = |(n, s): (usize, &Sequence)| s.batch == n && s.tokens == (0..problem.tokens);
        let packed = !problem.sequences.iter().enumerate().all(whole);
        let ends = || problem.sequences.iter().map(|s| s.tokens.end as u32);
        let cu_seqlens = match packed {
            true => {
                let cu: Vec<u32> = std::iter::once(0).chain(ends()).collect();
                Some(Tensor::from_slice(&cu, cu.len(), q.device())?)
            }
            false => None,
        };
        Ok(Self { problem, machine, cu_seqlens, longest, card })
    }

    /// How many states there are in all.
    pub fn states(&self) -> usize {
        self.problem.sequences.len() * self.problem.v_heads
    }

    /// The most chunks that a sequence has.
    fn chunks(&self) -> usize {
        self.longest.div_ceil(ffi::CHUNK).max(1)
    }

    /// Memory for the states `[N, chunks, HV, V, K]` that sweeps with V rows and K columns leave at the ends of chunks.
    pub fn ends(&self) -> Result<Buffer> {
        let p = self.problem;
        Buffer::new(
            &self.machine,
            DType::F32,
            (p.sequences.len(), self.chunks(), p.v_heads, p.v_dim, p.k_dim),
        )
    }

    /// Queues a sweep. Every element of its results gets written.
    pub fn run(&self, sweep: Sweep) -> Result<()> {
        if self.states() == 0 {
            return Ok(());
        }
        let p = self.problem;
        let (sequences, heads) = (p.sequences.len(), p.v_heads);
        let (rows, cols) = (sweep.rows, sweep.cols);
        let held = [sweep.read, sweep.write, sweep.value, sweep.gate, sweep.first, self.cu_seqlens.as_ref()];
        let held = held.map(|x| x.map(Held::new));
        let [read, write, value, gate, first, cu_seqlens] = held.each_ref().map(Option::as_ref);
        let gate_kind = match (sweep.gate, p.decay, sweep.transposed) {
            (None, _, _) | (_, Decay::None, _) => Gate::None,
            (_, Decay::Head | Decay::Scalar, _) => Gate::Scalar,
            (_, Decay::Channel, false) => Gate::Rows,
            (_, Decay::Channel, true) => Gate::Cols,
        };
        let with_ends = sweep.ends.is_some();
        let mut at = Addresses::new(&self.machine);
        let whole = ffi::Sweep {
            read: at.tensor(read, heads)?,
            write: at.tensor(write, heads)?,
            value: at.tensor(value, heads)?,
            gate: at.tensor(gate, heads)?,
            out: at.out(sweep.out)?,
            first: at.states(first, sweep.transposed)?,
            last: at.out_states(sweep.last, sweep.transposed)?,
            out_scale: sweep.out_scale,
            first_scale: sweep.first_scale,
            last_scale: sweep.last_scale,
            rows: rows as i32,
            cols: cols as i32,
            heads: heads as i32,
            gate_kind,
            writes: sweep.write.is_some().into(),
            reverse: sweep.reverse.into(),
            inclusive: sweep.inclusive.into(),
            cu_seqlens: at.numbers(cu_seqlens)?,
            sequences: sequences as i32,
            tokens: p.tokens as i64,
            segment: 0,
            segments: 1,
            starts: null_mut(),
            totals: null_mut(),
            ends: at.out_numbers(sweep.ends)?,
            ends_rows: rows as i32,
            shared_limit: self.card.shared_memory as i64,
        };
        let chosen = {
            let parts = row_parts(rows, ffi::CHUNKED_ROWS);
            // The outputs of parts will lie as well as these.
            let out = if parts.len() > 1 { whole.sums_at(whole.out.data) } else { whole.out };
            // SAFETY: it only looks at the sizes, kinds and dtypes of a sweep that is whole, and whether addresses are aligned.
            let fits = |part| unsafe { ffi::cla_chunked_shared_memory(&whole.of_rows(part, out)) } >= 0;
            let mode = if with_ends { Mode::Recurrent } else { p.mode };
            let size = Size { sequences, longest: self.longest, heads, cols };
            route::route(mode, &size, &self.card, parts.iter().all(fits))
        };
        let parts = row_parts(rows, chosen.most_rows());
        let most = parts[0].len();
        let (mut starts, mut totals, mut sums) = (None, None, None);
        let (segment, segments) = match chosen {
            _ if with_ends => (ffi::CHUNK, self.chunks()),
            Route::Segments { steps, segments } => {
                let decays = match gate_kind {
                    Gate::None | Gate::Scalar => 1,
                    Gate::Rows => most,
                    Gate::Cols => cols,
                };
                let buffer = |of_each: usize| {
                    Buffer::new(&self.machine, DType::F32, (sequences, segments, heads, of_each))
                };
                (starts, totals) = (Some(buffer(most * cols)?), Some(buffer(decays)?));
                (steps, segments)
            }
            _ => (0, 1),
        };
        let outs = p.batch * p.tokens * heads * cols;
        if parts.len() > 1 && !whole.out.data.is_null() {
            sums = Some(Buffer::new(&self.machine, DType::F32, (parts.len(), outs))?);
        }
        let mut at_scratch = Addresses::new(&self.machine);
        let starts = at_scratch.out_numbers(starts.as_mut())?;
        let totals = at_scratch.out_numbers(totals.as_mut())?;
        let in_parts = sums.is_some();
        let sums = at_scratch.out_numbers(sums.as_mut())?;
        for (i, part) in parts.iter().enumerate() {
            let out = if in_parts { whole.sums_at(sums.wrapping_add(i * outs).cast()) } else { whole.out };
            let (segment, segments) = (segment as i64, segments as i32);
            let call = ffi::Sweep { segment, segments, starts, totals, ..whole.of_rows(part, out) };
            self.launch(&call, chosen)?;
        }
        if in_parts {
            self.sum_middle(ffi::MiddleSums {
                data: sums,
                out: whole.out.data,
                dtype: whole.out.dtype,
                outer: 1,
                count: parts.len() as i64,
                inner: outs as i64,
            })?;
        }
        Ok(())
    }

    fn sum_middle(&self, call: ffi::MiddleSums) -> Result<()> {
        // SAFETY: as in `launch`, for contiguous tensors of these sizes.
        let code = unsafe { ffi::cla_sum_middle(&call, self.machine.stream()) };
        self.check("cla_sum_middle", code)
    }

    /// Adds up the gradients of a key head over the value heads that read it: `[B, T, HV, K]`, contiguous and in f32 if these
    /// are several, to `[B, T, H, K]`.
    pub fn sum_groups(&self, grad: Tensor, dtype: DType) -> Result<Tensor> {
        let p = self.problem;
        let groups = p.v_heads / p.k_heads;
        if groups == 1 {
            return grad.to_dtype(dtype);
        }
        let seen_as = [p.batch * p.tokens * p.k_heads, groups, p.k_dim];
        self.sum_seen_as(seen_as, grad, (p.batch, p.tokens, p.k_heads, p.k_dim), dtype)
    }

    /// Sums over D of `[B, T, HV, D]`, contiguous and in f32.
    pub fn sum_columns(&self, x: Tensor, dtype: DType) -> Result<Tensor> {
        let (b, t, h, d) = x.dims4()?;
        self.sum_seen_as([b * t * h, d, 1], x, (b, t, h, 1), dtype)?.squeeze(3)
    }

    fn sum_seen_as(
        &self,
        [outer, count, inner]: [usize; 3],
        x: Tensor,
        shape: (usize, usize, usize, usize),
        dtype: DType,
    ) -> Result<Tensor> {
        let mut out = Buffer::new(&self.machine, dtype, shape)?;
        let held = Held::new(&x);
        {
            let mut at = Addresses::new(&self.machine);
            let out = at.out(Some(&mut out))?;
            self.sum_middle(ffi::MiddleSums {
                data: at.numbers(Some(&held))?,
                out: out.data,
                dtype: out.dtype,
                outer: outer as i64,
                count: count as i64,
                inner: inner as i64,
            })?;
        }
        drop(held);
        Ok(out.into_tensor())
    }

    fn launch(&self, call: &ffi::Sweep, chosen: Route) -> Result<()> {
        type Kernel = unsafe extern "C" fn(*const ffi::Sweep, *mut std::ffi::c_void) -> i32;
        let kernels: &[(&str, Kernel)] = match chosen {
            Route::Recurrent => &[("cla_sweep_recurrent", ffi::cla_sweep_recurrent)],
            Route::Chunked => &[("cla_sweep_chunked", ffi::cla_sweep_chunked)],
            Route::Segments { .. } => &[
                ("cla_segment_states", ffi::cla_segment_states),
                ("cla_scan_segments", ffi::cla_scan_segments),
                ("cla_sweep_chunked", ffi::cla_sweep_chunked),
            ],
        };
        for (kernel, launch) in kernels {
            // SAFETY: the addresses, strides and sizes are those of live tensors of one problem, checked by `Problem` and
            // `Pass`; the caller holds them until all kernels are queued, and the stream orders whatever comes after.
            let code = unsafe { launch(call, self.machine.stream()) };
            self.check(kernel, code)?;
        }
        Ok(())
    }

    /// Queues what makes the gradient of the log decay of dq and dk.
    pub fn run_gate_gradients(&self, call: GateGradients) -> Result<()> {
        if self.states() == 0 {
            return Ok(());
        }
        let problem = self.problem;
        let heads = problem.v_heads;
        let (after, anchored) = match call.after {
            After::Nothing => (None, false),
            After::Sequences(after) => (Some(after), false),
            After::Chunks(after) => (Some(after), true),
        };
        let held = [Some(call.q), Some(call.k), Some(call.v), call.grad_out, Some(call.gate), after];
        let held = held.map(|x| x.map(Held::new));
        let [q, k, v, grad_out, gate, after] = held.each_ref().map(Option::as_ref);
        let cu_seqlens = self.cu_seqlens.as_ref().map(Held::new);
        let segments = self.chunks();
        let summed = problem.decay != Decay::Channel;
        let shape = (2 * problem.sequences.len(), segments, heads, if summed { 1 } else { problem.k_dim });
        let mut partial = (!anchored).then(|| Buffer::new(&self.machine, DType::F32, shape)).transpose()?;
        let mut at = Addresses::new(&self.machine);
        let [dq_out, dk_out] = call.keys_out;
        let call = ffi::GateGradient {
            q: at.tensor(q, heads)?,
            k: at.tensor(k, heads)?,
            v: at.tensor(v, heads)?,
            grad_out: at.tensor(grad_out, heads)?,
            gate: at.tensor(gate, heads)?,
            dq: at.out_numbers(Some(call.dq))?,
            dk: at.out_numbers(Some(call.dk))?,
            dq_out: at.out(dq_out)?,
            dk_out: at.out(dk_out)?,
            after: at.numbers(after)?,
            anchored: anchored.into(),
            partial: at.out_numbers(partial.as_mut())?,
            terms: at.out_numbers(Some(call.terms))?,
            dg: at.out(call.dg)?,
            scale: problem.scale,
            k_dim: problem.k_dim as i32,
            v_dim: problem.v_dim as i32,
            heads: heads as i32,
            summed: summed.into(),
            cu_seqlens: at.numbers(cu_seqlens.as_ref())?,
            sequences: problem.sequences.len() as i32,
            batch: problem.batch as i64,
            tokens: problem.tokens as i64,
            segment: ffi::CHUNK as i64,
            segments: segments as i32,
        };
        // SAFETY: as in `launch`.
        let code = unsafe { ffi::cla_gate_gradients(&call, self.machine.stream()) };
        self.check("cla_gate_gradients", code)
    }

    pub fn check(&self, kernel: &str, code: i32) -> Result<()> {
        let p = self.problem;
        if code != 0 {
            bail!(
                "{}: {kernel} could not be launched, CUDA error {code} (B = {}, T = {}, HV = {}, K = {}, V = {}, N = {})",
                p.name,
                p.batch,
                p.tokens,
                p.v_heads,
                p.k_dim,
                p.v_dim,
                p.sequences.len()
            );
        }
        Ok(())
    }
}

impl ffi::States {
    fn at_row(self, at: usize) -> Self {
        if self.data.is_null() {
            return self;
        }
        Self { data: self.data.wrapping_offset((at as i64 * self.row) as isize), ..self }
    }
}

impl ffi::Sweep {
    /// The sweep over some of the rows, with the outputs that come from them.
    fn of_rows(&self, rows: &Range<usize>, out: ffi::Tensor) -> Self {
        let at = rows.start;
        let ends =
            if self.ends.is_null() { self.ends } else { self.ends.wrapping_add(at * self.cols as usize) };
        Self {
            read: self.read.at_column(at),
            write: self.write.at_column(at),
            gate: if self.gate_kind == Gate::Rows { self.gate.at_column(at) } else { self.gate },
            out,
            first: self.first.at_row(at),
            last: self.last.at_row(at),
            rows: rows.len() as i32,
            ends,
            ..*self
        }
    }

    /// The outputs, in f32 and somewhere else; nothing if none are wanted.
    fn sums_at(&self, data: *mut c_void) -> ffi::Tensor {
        if self.out.data.is_null() {
            self.out
        } else {
            ffi::Tensor { data, dtype: ffi::Dtype::F32, ..self.out }
        }
    }
}

/// A sweep over states of `rows x cols`.
pub(super) struct Sweep<'a> {
    pub rows: usize,
    pub cols: usize,
    /// Whether rows are V and columns K; states in memory are K x V always.
    pub transposed: bool,
    pub read: Option<&'a Tensor>,
    /// Without it nothing is written to the state.
    pub write: Option<&'a Tensor>,
    pub value: Option<&'a Tensor>,
    pub gate: Option<&'a Tensor>,
    pub out: Option<&'a mut Buffer>,
    /// The states before the first step, and after the last.
    pub first: Option<&'a Tensor>,
    pub last: Option<&'a mut Buffer>,
    pub reverse: bool,
    pub inclusive: bool,
    pub out_scale: f32,
    pub first_scale: f32,
    pub last_scale: f32,
    /// The states at the ends of chunks, see [`Pass::ends`]. A sweep that has to write them goes token by token.
    pub ends: Option<&'a mut Buffer>,
}

/// What a gate's gradient begins with behind a last token: `[.., HV, K]`, or `[.., HV]` for a decay that the channels share;
/// f32, contiguous.
pub(super) enum After {
    Nothing,
    /// Of each sequence, `[N, ..]`.
    Sequences(Tensor),
    /// Of each chunk, `[N, chunks, ..]`.
    Chunks(Tensor),
}

/// See `cla_gate_gradients` in `cuda/cla.h`.
pub(super) struct GateGradients<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub grad_out: Option<&'a Tensor>,
    pub gate: &'a Tensor,
    pub dq: &'a mut Buffer,
    pub dk: &'a mut Buffer,
    /// Where dq and dk go, if not where they are.
    pub keys_out: [Option<&'a mut Buffer>; 2],
    pub after: &'a After,
    /// `[B, T, HV, K]`, or `[B, T, HV, 1]`, in f32.
    pub terms: &'a mut Buffer,
    /// Of the same shape, if it is not to take the place of the terms.
    pub dg: Option<&'a mut Buffer>,
}
