//! What is to be computed: sizes, decay, scale, sequences. Every operator describes its call as a [`Problem`] and the
//! checks of its arguments live here, so that a backend can rely on them.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use crate::memory;
use crate::options::{Mode, Options, State};

/// The roles a tensor can have as an argument of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Q,
    K,
    V,
    /// Log decay, laid out as [`Decay`] says.
    G,
    /// Of [`Update::Delta`].
    Beta,
    /// Of [`Update::LowRank`], as is `B`.
    A,
    B,
    /// Initial state.
    Kv,
    /// Initial normaliser.
    Z,
}

/// One value for each [`Role`] that takes part.
#[derive(Debug, Clone)]
pub(crate) struct Inputs<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub g: Option<T>,
    pub beta: Option<T>,
    pub a: Option<T>,
    pub b: Option<T>,
    pub kv: Option<T>,
    pub z: Option<T>,
}

impl<T> Inputs<T> {
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> Result<U>) -> Result<Inputs<U>> {
        Ok(Inputs {
            q: f(&self.q)?,
            k: f(&self.k)?,
            v: f(&self.v)?,
            g: self.g.as_ref().map(&mut f).transpose()?,
            beta: self.beta.as_ref().map(&mut f).transpose()?,
            a: self.a.as_ref().map(&mut f).transpose()?,
            b: self.b.as_ref().map(&mut f).transpose()?,
            kv: self.kv.as_ref().map(&mut f).transpose()?,
            z: self.z.as_ref().map(&mut f).transpose()?,
        })
    }

    /// The values that are there, with their roles, q, k, v first.
    pub fn list(self) -> Vec<(Role, T)> {
        let mut all = vec![(Role::Q, self.q), (Role::K, self.k), (Role::V, self.v)];
        all.extend(self.g.map(|x| (Role::G, x)));
        all.extend(self.beta.map(|x| (Role::Beta, x)));
        all.extend(self.a.map(|x| (Role::A, x)));
        all.extend(self.b.map(|x| (Role::B, x)));
        all.extend(self.kv.map(|x| (Role::Kv, x)));
        all.extend(self.z.map(|x| (Role::Z, x)));
        all
    }

    /// The inverse of [`Inputs::list`].
    pub fn from_list(roles: &[Role], values: &[T]) -> Result<Self>
    where
        T: Clone,
    {
        let get = |role| {
            let at = roles.iter().position(|r| *r == role)?;
            values.get(at).cloned()
        };
        match (get(Role::Q), get(Role::K), get(Role::V)) {
            (Some(q), Some(k), Some(v)) => Ok(Self {
                q,
                k,
                v,
                g: get(Role::G),
                beta: get(Role::Beta),
                a: get(Role::A),
                b: get(Role::B),
                kv: get(Role::Kv),
                z: get(Role::Z),
            }),
            _ => bail!("q, k and v must all be given"),
        }
    }
}

/// How the state fades between tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decay {
    /// It does not.
    None,
    /// `exp(g_h)`, `g: [HV]`.
    Head,
    /// `exp(g_{t,h})`, `g: [B, T, HV]`.
    Scalar,
    /// `diag exp(g_{t,h,:})`, `g: [B, T, HV, K]`, or `[B, T, H, K]` with [`Update::LowRank`].
    Channel,
}

/// What a token adds to the faded state `S~`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Update {
    /// `k v^T`.
    Additive,
    /// `k u^T` with `u = beta (v - S~^T k)`, `beta: [B, T, HV]`.
    Delta,
    /// `k v^T + b (S^T a)^T` with S before it fades, `a, b: [B, T, H, K]`.
    LowRank,
}

/// A packed or batched sequence: where its tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub batch: usize,
    pub tokens: Range<usize>,
}

/// One call of an operator, checked.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub name: &'static str,
    pub batch: usize,
    pub tokens: usize,
    pub k_heads: usize,
    pub v_heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub dtype: DType,
    pub scale: f32,
    pub decay: Decay,
    pub update: Update,
    pub normalize: bool,
    pub final_state: bool,
    pub mode: Mode,
    pub sequences: Vec<Sequence>,
}

impl Problem {
    /// Checks a call of the operator `name` and collects its inputs. `extra` has those beside q, k and v, by the names
    /// that the operator has for them.
    pub fn new(
        name: &'static str,
        [q, k, v]: [&Tensor; 3],
        (decay, update): (Decay, Update),
        extra: &[(Role, &str, &Tensor)],
        opts: &Options,
    ) -> Result<(Self, Inputs<Tensor>)> {
        let (batch, tokens, k_heads, k_dim) = dims4(name, "q", q, "[B, T, H, K]")?;
        expect_shape(name, "k", k, &[batch, tokens, k_heads, k_dim], "q's [B, T, H, K]")?;
        let (vb, vt, v_heads, v_dim) = dims4(name, "v", v, "[B, T, HV, V]")?;
        if (vb, vt) != (batch, tokens) {
            bail!("{name}: v is {:?}, its B and T must be those of q, {:?}", v.shape(), q.shape());
        }
        for (what, size) in [("H", k_heads), ("K", k_dim), ("HV", v_heads), ("V", v_dim)] {
            if size == 0 {
                bail!("{name}: {what} is 0 (q {:?}, v {:?}), it must be at least 1", q.shape(), v.shape());
            }
        }
        if v_heads % k_heads != 0 {
            bail!("{name}: v has HV = {v_heads} heads, it must be a multiple of q's H = {k_heads}");
        }
        let dtype = q.dtype();
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            bail!("{name}: q is {dtype:?}, it must be F32, F16 or BF16");
        }
        for (arg, x) in [("k", k), ("v", v)] {
            if x.dtype() != dtype {
                bail!("{name}: {arg} is {:?}, it must have q's dtype, {dtype:?}", x.dtype());
            }
        }
        if opts.normalize && (decay, update) != (Decay::None, Update::Additive) {
            bail!("{name}: normalize is set, it must not be: only linear_attn has it");
        }
        let scale = match opts.scale {
            None => 1.0 / (k_dim as f64).sqrt(),
            Some(scale) if (scale as f32).is_finite() => scale,
            Some(scale) => bail!("{name}: scale is {scale}, it must be finite in f32"),
        };
        let states = opts.cu_seqlens.as_ref().map_or(batch, |cu| cu.len().saturating_sub(1));
        check_sizes(name, [batch, tokens, states], [v_heads, k_dim, v_dim])?;
        let sequences = sequences(name, batch, tokens, opts.cu_seqlens.as_deref())?;
        let problem = Self {
            name,
            batch,
            tokens,
            k_heads,
            v_heads,
            k_dim,
            v_dim,
            dtype,
            scale: scale as f32,
            decay,
            update,
            normalize: opts.normalize,
            final_state: opts.final_state,
            mode: opts.mode,
            sequences,
        };
        for (role, arg, x) in extra {
            problem.check_extra(*role, arg, x)?;
        }
        let state = opts.initial_state.as_ref();
        state.map(|s| problem.check_state(s)).transpose()?;
        let extra = |role| extra.iter().find(|(r, ..)| *r == role).map(|(.., x)| Tensor::clone(x));
        let inputs = Inputs {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            g: extra(Role::G),
            beta: extra(Role::Beta),
            a: extra(Role::A),
            b: extra(Role::B),
            kv: state.map(|s| s.kv.clone()),
            z: state.and_then(|s| s.z.clone()),
        };
        for (role, x) in inputs.clone().list() {
            if !x.device().same_device(q.device()) {
                bail!(
                    "{name}: {role:?} is on {:?}, it must be on q's device, {:?}",
                    x.device().location(),
                    q.device().location()
                );
            }
        }
        Ok((problem, inputs))
    }

    fn check_extra(&self, role: Role, arg: &str, x: &Tensor) -> Result<()> {
        let names = match (role, self.decay, self.update) {
            (Role::G, Decay::Head, _) => "[HV]",
            (Role::Beta, ..) | (Role::G, Decay::Scalar, _) => "[B, T, HV]",
            (Role::A | Role::B, ..) | (Role::G, Decay::Channel, Update::LowRank) => "[B, T, H, K]",
            (Role::G, Decay::Channel, _) => "[B, T, HV, K]",
            _ => bail!("{}: {arg} is not an argument of it", self.name),
        };
        expect_shape(self.name, arg, x, &self.shape(role), names)?;
        if x.dtype() != self.dtype && x.dtype() != DType::F32 {
            bail!("{}: {arg} is {:?}, it must be F32 or q's dtype, {:?}", self.name, x.dtype(), self.dtype);
        }
        Ok(())
    }

    fn check_state(&self, state: &State) -> Result<()> {
        let (name, n) = (self.name, self.sequences.len());
        let kv = [n, self.v_heads, self.k_dim, self.v_dim];
        expect_shape(name, "initial state kv", &state.kv, &kv, "[N, HV, K, V], one state a sequence")?;
        match &state.z {
            Some(z) if self.normalize => {
                expect_shape(name, "initial state z", z, &kv[..3], "[N, HV, K], one state a sequence")?
            }
            Some(_) => {
                bail!("{name}: the initial state has a z, it must be None without normalize")
            }
            None if self.normalize => {
                bail!("{name}: the initial state has no z, it must be [N, HV, K] with normalize")
            }
            None => {}
        }
        for (arg, x) in [("kv", Some(&state.kv)), ("z", state.z.as_ref())] {
            if let Some(x) = x.filter(|x| x.dtype() != DType::F32) {
                bail!("{name}: the initial state's {arg} is {:?}, states must be F32", x.dtype());
            }
        }
        Ok(())
    }

    /// The key head that value head `h` reads.
    pub fn key_head(&self, h: usize) -> usize {
        h / (self.v_heads / self.k_heads)
    }

    /// How many heads the gates of channels have, and a and b.
    pub fn gate_heads(&self) -> usize {
        if self.update == Update::LowRank { self.k_heads } else { self.v_heads }
    }

    /// The head of the gate that value head `h` fades by.
    pub fn gate_head(&self, h: usize) -> usize {
        if self.update == Update::LowRank { self.key_head(h) } else { h }
    }

    /// The shape of the input `role`.
    pub fn shape(&self, role: Role) -> Vec<usize> {
        let (n, b, t) = (self.sequences.len(), self.batch, self.tokens);
        match role {
            Role::Q | Role::K => vec![b, t, self.k_heads, self.k_dim],
            Role::V => vec![b, t, self.v_heads, self.v_dim],
            Role::G => match self.decay {
                Decay::None => vec![],
                Decay::Head => vec![self.v_heads],
                Decay::Scalar => vec![b, t, self.v_heads],
                Decay::Channel => vec![b, t, self.gate_heads(), self.k_dim],
            },
            Role::Beta => vec![b, t, self.v_heads],
            Role::A | Role::B => vec![b, t, self.k_heads, self.k_dim],
            Role::Kv => vec![n, self.v_heads, self.k_dim, self.v_dim],
            Role::Z => vec![n, self.v_heads, self.k_dim],
        }
    }

    /// The roles of the outputs' shapes: out, then the final state.
    pub fn outputs(&self) -> &'static [Role] {
        match (self.final_state, self.normalize) {
            (false, _) => &[Role::V],
            (true, false) => &[Role::V, Role::Kv],
            (true, true) => &[Role::V, Role::Kv, Role::Z],
        }
    }
}

/// No index into an argument, a result, a gradient or a copy of one may overflow, whatever the backend.
fn check_sizes(
    name: &str,
    [batch, tokens, states]: [usize; 3],
    [v_heads, k_dim, v_dim]: [usize; 3],
) -> Result<()> {
    // The column that normalises.
    let v_cols = v_dim.saturating_add(1);
    for (what, sizes) in [
        ("[B, T, HV, K]", [batch, tokens, v_heads, k_dim]),
        ("[B, T, HV, V]", [batch, tokens, v_heads, v_cols]),
        ("[N, HV, K, V]", [states, v_heads, k_dim, v_cols]),
    ] {
        if !memory::is_addressable(&sizes) {
            bail!(
                "{name}: B = {batch}, T = {tokens}, HV = {v_heads}, K = {k_dim}, V = {v_dim} make {what} larger than can \
                 be addressed, they must be smaller"
            );
        }
    }
    // The one thing that a batch takes memory for whether it has tokens or not.
    let bytes = states as f64 * size_of::<Sequence>() as f64;
    if !memory::is_available(bytes) {
        bail!("{name}: B is {batch}, the list of sequences needs {} of memory", memory::shown(bytes));
    }
    Ok(())
}

pub(crate) fn sequences(
    name: &str,
    batch: usize,
    tokens: usize,
    cu_seqlens: Option<&[u32]>,
) -> Result<Vec<Sequence>> {
    let Some(cu) = cu_seqlens else {
        return Ok((0..batch).map(|batch| Sequence { batch, tokens: 0..tokens }).collect());
    };
    if batch != 1 {
        bail!("{name}: cu_seqlens was given with B = {batch}, packed sequences need B = 1");
    }
    match cu {
        [0, ..] => {}
        [] => bail!("{name}: cu_seqlens is empty, it must begin with 0"),
        [first, ..] => bail!("{name}: cu_seqlens begins with {first}, it must begin with 0"),
    }
    if let Some(i) = (1..cu.len()).find(|&i| cu[i] < cu[i - 1]) {
        bail!("{name}: cu_seqlens must never decrease, but entry {i} is {} after {}", cu[i], cu[i - 1]);
    }
    let last = cu[cu.len() - 1] as usize;
    if last != tokens {
        bail!("{name}: cu_seqlens ends at {last}, it must end at T = {tokens}");
    }
    let tokens = |w: &[u32]| Sequence { batch: 0, tokens: w[0] as usize..w[1] as usize };
    Ok(cu.windows(2).map(tokens).collect())
}

fn dims4(name: &str, arg: &str, x: &Tensor, names: &str) -> Result<(usize, usize, usize, usize)> {
    match *x.dims() {
        [a, b, c, d] => Ok((a, b, c, d)),
        _ => bail!("{name}: {arg} is {:?}, it must have 4 dimensions, {names}", x.shape()),
    }
}

fn expect_shape(name: &str, arg: &str, x: &Tensor, shape: &[usize], names: &str) -> Result<()> {
    if x.dims() != shape {
        bail!("{name}: {arg} is {:?}, it must be {shape:?}, {names}", x.shape());
    }
    Ok(())
}
