//! The calls of the delta families' kernels, from their tensors to the launches. See `cuda/delta.h`.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use super::ffi::{self, SegmentStates};
use super::route::{Route, Size, Spans, route};
use crate::cuda::ffi::Gate;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};
use crate::cuda::sweep::Pass;
use crate::options::Mode;
use crate::problem::{Decay, Inputs, Update};

/// The segments of all sequences.
pub(super) struct Segments {
    /// Of each sequence, and of all.
    each: usize,
    all: usize,
    /// How many there are before each sequence, where sequences differ.
    cu: Option<Tensor>,
}

impl Segments {
    pub fn new(pass: &Pass) -> Result<Self> {
        let of = pass.problem.sequences.iter().map(|s| s.tokens.len().div_ceil(ffi::SEGMENT));
        let cu: Vec<u32> = std::iter::once(0)
            .chain(of.scan(0, |sum, n| {
                *sum += n as u32;
                Some(*sum)
            }))
            .collect();
        let all = cu[cu.len() - 1] as usize;
        let packed = pass.cu_seqlens.as_ref();
        let cu = packed.map(|x| Tensor::from_slice(&cu, cu.len(), x.device())).transpose()?;
        Ok(Self { each: pass.longest.div_ceil(ffi::SEGMENT), all, cu })
    }

    /// Memory for a state of each segment and head.
    pub fn states(&self, pass: &Pass) -> Result<Buffer> {
        let p = pass.problem;
        Buffer::new(&pass.machine, DType::F32, (self.all, p.v_heads, p.k_dim, p.v_dim))
    }

    fn of(&self, data: *mut f32, cu_segments: *const u32) -> SegmentStates {
        SegmentStates { data, cu_segments, each: self.each as i64, all: self.all as i64 }
    }
}

/// What the two sweeps of a problem differ in.
#[derive(Default)]
pub(super) struct Sweep<'a> {
    /// v, or do in reverse.
    pub value: Option<&'a Tensor>,
    pub reverse: bool,
    pub inner: Option<&'a mut Buffer>,
    pub out: Option<&'a mut Buffer>,
    pub first: Option<&'a Tensor>,
    pub last: Option<&'a mut Buffer>,
    pub anchors: Option<&'a mut Buffer>,
    /// Needed with anchors.
    pub segments: Option<&'a Segments>,
}

/// What all kernels read of a problem, open for reading as long as this is there.
struct Opened<'a> {
    pass: &'a Pass<'a>,
    of_keys: [Option<Held<'a>>; 6],
    cu_seqlens: Option<Held<'a>>,
}

impl<'a> Opened<'a> {
    fn new(pass: &'a Pass<'a>, x: &'a Inputs<Tensor>) -> Self {
        let of_keys = [Some(&x.q), Some(&x.k), x.g.as_ref(), x.a.as_ref(), x.b.as_ref(), x.beta.as_ref()];
        Self {
            pass,
            of_keys: of_keys.map(|x| x.map(Held::new)),
            cu_seqlens: pass.cu_seqlens.as_ref().map(Held::new),
        }
    }

    fn problem(&'a self, at: &mut Addresses<'a>) -> Result<ffi::Problem> {
        let p = self.pass.problem;
        let [q, k, gate, a, b, beta] = self.of_keys.each_ref().map(Option::as_ref);
        let mut tensor = |x| at.tensor(x, p.v_heads);
        Ok(ffi::Problem {
            q: tensor(q)?,
            k: tensor(k)?,
            gate: tensor(gate)?,
            a: tensor(a)?,
            b: tensor(b)?,
            beta: tensor(beta)?,
            scale: p.scale,
            k_dim: p.k_dim as i32,
            v_dim: p.v_dim as i32,
            heads: p.v_heads as i32,
            gate_kind: match p.decay {
                Decay::None => Gate::None,
                Decay::Head | Decay::Scalar => Gate::Scalar,
                Decay::Channel => Gate::Rows,
            },
            low_rank: (p.update == Update::LowRank).into(),
            cu_seqlens: at.numbers(self.cu_seqlens.as_ref())?,
            sequences: p.sequences.len() as i32,
            tokens: p.tokens as i64,
        })
    }
}

/// Queues a sweep. Every element of its results gets written.
pub(super) fn run(pass: &Pass, x: &Inputs<Tensor>, sweep: Sweep) -> Result<()> {
    if pass.states() == 0 {
        return Ok(());
    }
    let p = pass.problem;
    let heads = p.v_heads;
    let size = Size { states: pass.states(), longest: pass.longest, rows: p.k_dim, cols: p.v_dim };
    let opened = Opened::new(pass, x);
    let [value, first] = [sweep.value, sweep.first].map(|x| x.map(Held::new));
    let mut at = Addresses::new(&pass.machine);
    let anchors = at.out_numbers(sweep.anchors)?;
    let mut call = ffi::Sweep {
        of: opened.problem(&mut at)?,
        value: at.tensor(value.as_ref(), heads)?,
        inner: at.out(sweep.inner)?,
        out: at.out(sweep.out)?,
        first: at.states(first.as_ref(), false)?,
        last: at.out_states(sweep.last, false)?,
        anchors: SegmentStates { data: anchors, cu_segments: std::ptr::null(), each: 0, all: 0 },
        reverse: sweep.reverse.into(),
        columns: 0,
        shared_limit: pass.card.shared_memory as i64,
        prepared: std::ptr::null_mut(),
        spans: ffi::Spans {
            count: 1,
            length: i64::MAX,
            changes: std::ptr::null_mut(),
            starts: std::ptr::null_mut(),
        },
    };
    let needs = |columns: usize| {
        let call = ffi::Sweep { columns: columns as i32, ..call };
        // SAFETY: it only looks at the sizes, kinds and dtypes of a sweep that is whole.
        usize::try_from(unsafe { ffi::cla_delta_shared_memory(&call) }).ok()
    };
    let chosen = route(p.mode, &size, &pass.card, needs);
    let own = match (chosen, sweep.segments) {
        (Route::Chunked { .. }, None) => Some(Segments::new(pass)?),
        _ => None,
    };
    let segments = sweep.segments.or(own.as_ref());
    let cu_segments = segments.and_then(|s| s.cu.as_ref()).map(Held::new);
    let (mut prepared, mut changes, mut starts) = (None, None, None);
    if let (Route::Chunked { columns, spans }, Some(segments)) = (chosen, segments) {
        // SAFETY: as above.
        let bytes = unsafe { ffi::cla_delta_prepared_bytes(&call) } as usize;
        let each = bytes / DType::F32.size_in_bytes();
        prepared = Some(Buffer::new(&pass.machine, DType::F32, (segments.all, heads, each))?);
        call.columns = columns as i32;
        if let Some(Spans { length, count, .. }) = spans {
            let (sequences, of_states) = (p.sequences.len(), p.k_dim * p.v_dim);
            let shape = (sequences, count - 1, heads, of_states + p.k_dim * p.k_dim);
            changes = Some(Buffer::new(&pass.machine, DType::F32, shape)?);
            starts = Some(Buffer::new(&pass.machine, DType::F32, (sequences, count, heads, of_states))?);
            (call.spans.count, call.spans.length) = (count as i32, length as i64);
        }
    }
    let mut at_scratch = Addresses::new(&pass.machine);
    let cu_segments = at_scratch.numbers(cu_segments.as_ref())?;
    if let Some(segments) = segments {
        call.anchors = segments.of(anchors, cu_segments);
    }
    call.prepared = at_scratch.out_numbers(prepared.as_mut())?.cast();
    call.spans.changes = at_scratch.out_numbers(changes.as_mut())?;
    call.spans.starts = at_scratch.out_numbers(starts.as_mut())?;
    type Kernel = unsafe extern "C" fn(*const ffi::Sweep, *mut std::ffi::c_void) -> i32;
    let kernels: &[(&str, Kernel, ffi::Sweep)] = match chosen {
        Route::Recurrent => &[("cla_delta_recurrent", ffi::cla_delta_recurrent, call)],
        Route::Chunked { spans: None, .. } => &[
            ("cla_delta_prepare", ffi::cla_delta_prepare, call),
            ("cla_delta_chunked", ffi::cla_delta_chunked, call),
        ],
        Route::Chunked { spans: Some(Spans { columns, .. }), .. } => &[
            ("cla_delta_prepare", ffi::cla_delta_prepare, call),
            ("cla_delta_changes", ffi::cla_delta_changes, ffi::Sweep { columns: columns as i32, ..call }),
            ("cla_delta_starts", ffi::cla_delta_starts, call),
            ("cla_delta_chunked", ffi::cla_delta_chunked, call),
        ],
    };
    for (kernel, launch, call) in kernels {
        // SAFETY: the addresses, strides and sizes are those of live tensors of one problem, checked by `Problem` and `Pass`,
        // which are held until all kernels are queued; the stream orders whatever comes after.
        let code = unsafe { launch(call, pass.machine.stream()) };
        pass.check(kernel, code)?;
    }
    Ok(())
}

/// What `cla_delta_gradients` reads beside the inputs.
pub(super) struct Given<'a> {
    pub grad_out: Option<&'a Tensor>,
    pub written: &'a Tensor,
    pub of_written: &'a Tensor,
    pub segments: &'a Segments,
    pub starts: &'a Tensor,
    pub ends: &'a Tensor,
}

/// What it writes.
#[derive(Default)]
pub(super) struct Gradients {
    pub dq: Option<Buffer>,
    pub dk: Option<Buffer>,
    pub da: Option<Buffer>,
    pub db: Option<Buffer>,
    pub dg: Option<Buffer>,
    pub dbeta: Option<Buffer>,
}

/// The columns of V in as many parts as calls of [`run_gradients`] are to have them, and how many rows these take at a time.
pub(super) fn gradient_parts(
    pass: &Pass,
    x: &Inputs<Tensor>,
    given: &Given,
) -> Result<(Vec<Range<usize>>, usize)> {
    let p = pass.problem;
    if p.batch * p.tokens == 0 {
        return Ok((std::iter::once(0..p.v_dim).collect(), p.k_dim));
    }
    let (rows, columns) = with_gradient(pass, x, given, 0..p.v_dim, &mut Gradients::default(), |call| {
        let (mut rows, mut columns) = (0, 0);
        // SAFETY: of the call it only looks at sizes, kinds and dtypes.
        unsafe { ffi::cla_delta_gradient_part(call, &mut rows, &mut columns) };
        Ok((rows as usize, columns as usize))
    })?;
    let columns = (0..p.v_dim).step_by(columns).map(|from| from..p.v_dim.min(from + columns));
    Ok((columns.collect(), rows))
}

/// Queues the gradients of keys, gates and beta, as far as they come from some of the columns of V, so many rows at a time.
pub(super) fn run_gradients(
    pass: &Pass,
    x: &Inputs<Tensor>,
    given: &Given,
    columns: Range<usize>,
    rows: usize,
    found: &mut Gradients,
) -> Result<()> {
    with_gradient(pass, x, given, columns, found, |call| {
        for from in (0..pass.problem.k_dim).step_by(rows) {
            // SAFETY: as in `run`.
            let code = unsafe { ffi::cla_delta_gradients(&call.of_rows(from, rows), pass.machine.stream()) };
            pass.check("cla_delta_gradients", code)?;
        }
        Ok(())
    })
}

impl ffi::Gradient {
    /// The gradients of up to `count` rows of the states, from `from` on.
    fn of_rows(&self, from: usize, count: usize) -> Self {
        let of = &self.of;
        let [q, k, a, b] = [of.q, of.k, of.a, of.b].map(|x| x.at_column(from));
        let by_channel = of.gate_kind == Gate::Rows;
        let gate = if by_channel { of.gate.at_column(from) } else { of.gate };
        let k_dim = (of.k_dim as usize - from).min(count) as i32;
        let before = from * self.state_columns as usize;
        let states = |x: &SegmentStates| SegmentStates { data: x.data.wrapping_add(before), ..*x };
        Self {
            of: ffi::Problem { q, k, a, b, gate, k_dim, ..*of },
            starts: states(&self.starts),
            ends: states(&self.ends),
            dq: self.dq.at_column(from),
            dk: self.dk.at_column(from),
            da: self.da.at_column(from),
            db: self.db.at_column(from),
            dg: self.dg.at_column(if by_channel { from } else { from / ffi::COLUMNS }),
            // It has no rows.
            dbeta: if from == 0 { self.dbeta } else { NO_TENSOR },
            ..*self
        }
    }
}

fn with_gradient<R>(
    pass: &Pass,
    x: &Inputs<Tensor>,
    given: &Given,
    columns: Range<usize>,
    found: &mut Gradients,
    f: impl FnOnce(&ffi::Gradient) -> Result<R>,
) -> Result<R> {
    let heads = pass.problem.v_heads;
    let opened = Opened::new(pass, x);
    let numbers = [given.segments.cu.as_ref(), Some(given.starts), Some(given.ends)];
    let [cu_segments, starts, ends] = numbers.map(|x| x.map(Held::new));
    let part = |x: &Tensor| x.narrow(3, columns.start, columns.len());
    let of_values = [Some(&x.v), given.grad_out, Some(given.written), Some(given.of_written)];
    let [v, grad_out, written, of_written] = of_values.map(|x| x.map(part).transpose());
    let of_values = [v?, grad_out?, written?, of_written?];
    let of_values = of_values.each_ref().map(|x| x.as_ref().map(Held::new));
    let [v, grad_out, written, of_written] = of_values.each_ref().map(Option::as_ref);
    let mut at = Addresses::new(&pass.machine);
    let cu_segments = at.numbers(cu_segments.as_ref())?;
    let [starts, ends]: [*const f32; 2] = [at.numbers(starts.as_ref())?, at.numbers(ends.as_ref())?];
    let states =
        |data: *const f32| given.segments.of(data.wrapping_add(columns.start).cast_mut(), cu_segments);
    let call = ffi::Gradient {
        of: ffi::Problem { v_dim: columns.len() as i32, ..opened.problem(&mut at)? },
        v: at.tensor(v, heads)?,
        grad_out: at.tensor(grad_out, heads)?,
        written: at.tensor(written, heads)?,
        of_written: at.tensor(of_written, heads)?,
        starts: states(starts),
        ends: states(ends),
        state_rows: pass.problem.k_dim as i32,
        state_columns: pass.problem.v_dim as i32,
        dq: at.out(found.dq.as_mut())?,
        dk: at.out(found.dk.as_mut())?,
        da: at.out(found.da.as_mut())?,
        db: at.out(found.db.as_mut())?,
        dg: at.out(found.dg.as_mut())?,
        dbeta: at.out(found.dbeta.as_mut())?,
        shared_limit: if pass.problem.mode == Mode::Recurrent { 0 } else { pass.card.shared_memory as i64 },
    };
    f(&call)
}
