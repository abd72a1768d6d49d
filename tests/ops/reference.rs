//! The one reference implementation: the recurrence, token by token, in f64, with nothing rearranged.
//!
//! ```text
//! S~_t = diag(exp g_t) S_{t-1}
//! S_t = S~_t + k_t v_t^T                          z_t = z_{t-1} + k_t
//! S_t = S~_t + k_t (beta_t (v_t - S~_t^T k_t))^T  delta
//! S_t = S~_t + k_t v_t^T + b_t (S_{t-1}^T a_t)^T  low rank
//! o_t = scale * S_t^T q_t                        (/ (scale * q_t . z_t + eps) if normalised)
//! ```
//!
//! The backward keeps every `S_t` and differentiates these lines in reverse, so it is only for small problems.

use std::ops::Range;

/// What the normalisation adds to its denominator.
pub const EPS: f64 = 1e-10;

#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub b: usize,
    pub t: usize,
    /// Heads of q and k.
    pub h: usize,
    /// Heads of v, of the gates and of the state: a multiple of `h`.
    pub hv: usize,
    pub k: usize,
    pub v: usize,
}

/// The natural logarithm of the decay.
#[derive(Debug, Clone)]
pub enum Decay {
    None,
    /// `[HV]`
    PerHead(Vec<f64>),
    /// `[B, T, HV]`
    PerToken(Vec<f64>),
    /// `[B, T, HV, K]`
    PerChannel(Vec<f64>),
}

/// What a token writes.
#[derive(Debug, Clone)]
pub enum Update {
    Additive,
    /// `[B, T, HV]`
    Delta {
        beta: Vec<f64>,
    },
    /// Both `[B, T, H, K]`; a decay per channel is that too.
    LowRank {
        a: Vec<f64>,
        b: Vec<f64>,
    },
}

/// Inputs, each flat in the layout of the operators: `q, k [B,T,H,K]`, `v [B,T,HV,V]`, `kv [N,HV,K,V]`, `z [N,HV,K]`.
#[derive(Debug, Clone)]
pub struct Problem {
    pub sizes: Sizes,
    pub cu_seqlens: Option<Vec<usize>>,
    pub scale: f64,
    pub normalize: bool,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub decay: Decay,
    pub update: Update,
    pub kv: Option<Vec<f64>>,
    pub z: Option<Vec<f64>>,
}

/// The results, or a cotangent for each.
#[derive(Debug, Clone)]
pub struct Outputs {
    pub out: Vec<f64>,
    pub kv: Vec<f64>,
    pub z: Vec<f64>,
}

/// `log_decay` has the layout of the [`Decay`] it belongs to and is empty without one.
#[derive(Debug, Clone)]
pub struct Gradients {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub log_decay: Vec<f64>,
    /// The norm of what `log_decay` is summed up from, one number a token and channel.
    pub log_decay_terms: f64,
    pub kv: Vec<f64>,
    pub z: Vec<f64>,
    /// Empty where there is no such input, as are `a` and `b`.
    pub beta: Vec<f64>,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
}

/// One value head of one sequence: where its tokens and its state are.
struct Lane {
    batch: usize,
    tokens: Range<usize>,
    /// Key head.
    h: usize,
    /// Value head.
    hv: usize,
    /// Index of the state in `[N, HV]`.
    state: usize,
}

impl Problem {
    fn lanes(&self) -> Vec<Lane> {
        let Sizes { b, t, h, hv, .. } = self.sizes;
        let sequences: Vec<(usize, Range<usize>)> = match &self.cu_seqlens {
            Some(ends) => ends.windows(2).map(|w| (0, w[0]..w[1])).collect(),
            None => (0..b).map(|batch| (batch, 0..t)).collect(),
        };
        let lane = |n: usize, value_head: usize| Lane {
            batch: sequences[n].0,
            tokens: sequences[n].1.clone(),
            h: value_head / (hv / h),
            hv: value_head,
            state: n * hv + value_head,
        };
        (0..sequences.len())
            .flat_map(|n| (0..hv).map(move |value_head| (n, value_head)))
            .map(|(n, value_head)| lane(n, value_head))
            .collect()
    }

    fn n_states(&self) -> usize {
        match &self.cu_seqlens {
            Some(ends) => ends.len() - 1,
            None => self.sizes.b,
        }
    }

    /// Where the K numbers of q and k of a token begin.
    fn key_at(&self, lane: &Lane, t: usize) -> usize {
        ((lane.batch * self.sizes.t + t) * self.sizes.h + lane.h) * self.sizes.k
    }

    /// Where the V numbers of v and o of a token begin.
    fn value_at(&self, lane: &Lane, t: usize) -> usize {
        ((lane.batch * self.sizes.t + t) * self.sizes.hv + lane.hv) * self.sizes.v
    }

    /// Where the log decay of channel `c` is in its array; `None` without decay.
    fn decay_at(&self, lane: &Lane, t: usize, c: usize) -> Option<usize> {
        let token = (lane.batch * self.sizes.t + t) * self.sizes.hv + lane.hv;
        match self.decay {
            Decay::None => None,
            Decay::PerHead(_) => Some(lane.hv),
            Decay::PerToken(_) => Some(token),
            Decay::PerChannel(_) => match self.update {
                Update::LowRank { .. } => Some(self.key_at(lane, t) + c),
                _ => Some(token * self.sizes.k + c),
            },
        }
    }

    fn decay(&self, lane: &Lane, t: usize, c: usize) -> f64 {
        let (Decay::PerHead(g) | Decay::PerToken(g) | Decay::PerChannel(g)) = &self.decay else {
            return 1.0;
        };
        self.decay_at(lane, t, c).map_or(1.0, |i| g[i].exp())
    }

    fn initial(&self, lane: &Lane) -> State {
        let Sizes { k, v, .. } = self.sizes;
        let part = |all: &Option<Vec<f64>>, n: usize| match all {
            Some(all) => all[lane.state * n..][..n].to_vec(),
            None => vec![0.0; n],
        };
        State { s: part(&self.kv, k * v), z: part(&self.z, k) }
    }

    /// What token `t` writes with its key, and what it reads from the state before it writes, in order to.
    fn written(&self, lane: &Lane, t: usize, before: &State) -> (Vec<f64>, Vec<f64>) {
        let Sizes { k: kn, v: vn, hv, .. } = self.sizes;
        let key_at = self.key_at(lane, t);
        let value = self.v[self.value_at(lane, t)..][..vn].to_vec();
        let read = |by: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..vn).map(|j| (0..kn).map(|c| by(c) * before.s[c * vn + j]).sum()).collect()
        };
        match &self.update {
            Update::Additive => (value, vec![]),
            Update::Delta { beta } => {
                let beta = beta[(lane.batch * self.sizes.t + t) * hv + lane.hv];
                let old = read(&|c| self.k[key_at + c] * self.decay(lane, t, c));
                (value.iter().zip(&old).map(|(v, old)| beta * (v - old)).collect(), old)
            }
            Update::LowRank { a, .. } => (value, read(&|c| a[key_at + c])),
        }
    }

    /// The state after token `t`, from the state before it.
    fn step(&self, lane: &Lane, t: usize, state: &mut State) {
        let Sizes { k: kn, v: vn, .. } = self.sizes;
        let key_at = self.key_at(lane, t);
        let (written, read) = self.written(lane, t, state);
        for (c, key) in self.k[key_at..][..kn].iter().enumerate() {
            let decay = self.decay(lane, t, c);
            let row = &mut state.s[c * vn..][..vn];
            for (s, u) in row.iter_mut().zip(&written) {
                *s = *s * decay + key * u;
            }
            if let Update::LowRank { b, .. } = &self.update {
                row.iter_mut().zip(&read).for_each(|(s, w)| *s += b[key_at + c] * w);
            }
            state.z[c] += key;
        }
    }

    /// `scale * S^T q` and what it is to be divided by.
    fn read(&self, lane: &Lane, t: usize, state: &State) -> (Vec<f64>, f64) {
        let Sizes { k: kn, v: vn, .. } = self.sizes;
        let query = &self.q[self.key_at(lane, t)..][..kn];
        let mut numerator = vec![0.0; vn];
        for (c, query) in query.iter().enumerate() {
            for (o, s) in numerator.iter_mut().zip(&state.s[c * vn..][..vn]) {
                *o += self.scale * query * s;
            }
        }
        let denominator = match self.normalize {
            true => self.scale * dot(query, &state.z) + EPS,
            false => 1.0,
        };
        (numerator, denominator)
    }

    pub fn forward(&self) -> Outputs {
        let Sizes { b, t, hv, k, v, .. } = self.sizes;
        let mut result = Outputs { out: vec![0.0; b * t * hv * v], kv: Vec::new(), z: Vec::new() };
        for lane in self.lanes() {
            let mut state = self.initial(&lane);
            for t in lane.tokens.clone() {
                self.step(&lane, t, &mut state);
                let (numerator, denominator) = self.read(&lane, t, &state);
                let at = self.value_at(&lane, t);
                for (o, n) in result.out[at..][..v].iter_mut().zip(&numerator) {
                    *o = n / denominator;
                }
            }
            result.kv.extend(&state.s);
            result.z.extend(&state.z);
        }
        assert_eq!(result.kv.len(), self.n_states() * hv * k * v);
        result
    }

    /// The gradient of `<out, d.out> + <kv, d.kv> + <z, d.z>` for each input.
    pub fn backward(&self, d: &Outputs) -> Gradients {
        let Sizes { hv, k, v, .. } = self.sizes;
        let n_decay = match &self.decay {
            Decay::None => 0,
            Decay::PerHead(g) | Decay::PerToken(g) | Decay::PerChannel(g) => g.len(),
        };
        let mut grads = Gradients {
            q: vec![0.0; self.q.len()],
            k: vec![0.0; self.k.len()],
            v: vec![0.0; self.v.len()],
            log_decay: vec![0.0; n_decay],
            log_decay_terms: 0.0,
            kv: vec![0.0; self.n_states() * hv * k * v],
            z: vec![0.0; self.n_states() * hv * k],
            beta: vec![0.0; if let Update::Delta { beta } = &self.update { beta.len() } else { 0 }],
            a: vec![0.0; if let Update::LowRank { a, .. } = &self.update { a.len() } else { 0 }],
            b: vec![0.0; if let Update::LowRank { b, .. } = &self.update { b.len() } else { 0 }],
        };
        for lane in self.lanes() {
            let mut states = vec![self.initial(&lane)];
            for t in lane.tokens.clone() {
                let mut next = states[states.len() - 1].clone();
                self.step(&lane, t, &mut next);
                states.push(next);
            }
            let mut d_state = State {
                s: d.kv[lane.state * k * v..][..k * v].to_vec(),
                z: d.z[lane.state * k..][..k].to_vec(),
            };
            for (i, t) in lane.tokens.clone().enumerate().rev() {
                self.read_backward(&lane, t, &states[i + 1], d, &mut d_state, &mut grads);
                self.step_backward(&lane, t, &states[i], &mut d_state, &mut grads);
            }
            grads.kv[lane.state * k * v..][..k * v].copy_from_slice(&d_state.s);
            grads.z[lane.state * k..][..k].copy_from_slice(&d_state.z);
        }
        grads.log_decay_terms = grads.log_decay_terms.sqrt();
        grads
    }

    fn read_backward(
        &self,
        lane: &Lane,
        t: usize,
        state: &State,
        d: &Outputs,
        d_state: &mut State,
        grads: &mut Gradients,
    ) {
        let Sizes { k: kn, v: vn, .. } = self.sizes;
        let key_at = self.key_at(lane, t);
        let query = &self.q[key_at..][..kn];
        let d_out = &d.out[self.value_at(lane, t)..][..vn];
        let (numerator, denominator) = self.read(lane, t, state);
        let d_numerator: Vec<f64> = d_out.iter().map(|d| d / denominator).collect();
        let d_denominator = match self.normalize {
            true => -dot(&numerator, d_out) / (denominator * denominator),
            false => 0.0,
        };
        for (c, query) in query.iter().enumerate() {
            let row = c * vn..(c + 1) * vn;
            grads.q[key_at + c] +=
                self.scale * (dot(&state.s[row.clone()], &d_numerator) + d_denominator * state.z[c]);
            for (ds, dn) in d_state.s[row].iter_mut().zip(&d_numerator) {
                *ds += self.scale * query * dn;
            }
            d_state.z[c] += self.scale * query * d_denominator;
        }
    }

    fn step_backward(
        &self,
        lane: &Lane,
        t: usize,
        before: &State,
        d_state: &mut State,
        grads: &mut Gradients,
    ) {
        let Sizes { k: kn, v: vn, hv, .. } = self.sizes;
        let (key_at, value_at) = (self.key_at(lane, t), self.value_at(lane, t));
        let (written, read) = self.written(lane, t, before);
        let times_state = |d: &[f64], by: &[f64]| -> Vec<f64> {
            (0..vn).map(|j| (0..kn).map(|c| by[c] * d[c * vn + j]).sum()).collect()
        };
        let d_written = times_state(&d_state.s, &self.k[key_at..][..kn]);
        // The gradient of what was read, and of the value.
        let (mut d_read, mut d_value) = (vec![], d_written.clone());
        match &self.update {
            Update::Additive => {}
            Update::Delta { beta } => {
                let at = (lane.batch * self.sizes.t + t) * hv + lane.hv;
                let value = &self.v[value_at..][..vn];
                grads.beta[at] += (0..vn).map(|j| d_written[j] * (value[j] - read[j])).sum::<f64>();
                d_value.iter_mut().for_each(|d| *d *= beta[at]);
                d_read = d_value.iter().map(|d| -d).collect();
            }
            Update::LowRank { b, .. } => d_read = times_state(&d_state.s, &b[key_at..][..kn]),
        }
        grads.v[value_at..][..vn].iter_mut().zip(&d_value).for_each(|(dv, d)| *dv += d);
        for c in 0..kn {
            let (row, old) = (&mut d_state.s[c * vn..][..vn], &before.s[c * vn..][..vn]);
            let decay = self.decay(lane, t, c);
            grads.k[key_at + c] += dot(row, &written) + d_state.z[c];
            if let Update::Delta { .. } = self.update {
                grads.k[key_at + c] += decay * dot(old, &d_read);
                row.iter_mut().zip(&d_read).for_each(|(ds, d)| *ds += self.k[key_at + c] * d);
            }
            if let Some(at) = self.decay_at(lane, t, c) {
                let term = decay * dot(row, old);
                grads.log_decay[at] += term;
                grads.log_decay_terms += term * term;
            }
            if let Update::LowRank { .. } = self.update {
                grads.b[key_at + c] += dot(row, &read);
                grads.a[key_at + c] += dot(old, &d_read);
            }
            row.iter_mut().for_each(|ds| *ds *= decay);
            if let Update::LowRank { a, .. } = &self.update {
                row.iter_mut().zip(&d_read).for_each(|(ds, d)| *ds += a[key_at + c] * d);
            }
        }
    }
}

#[derive(Debug, Clone)]
struct State {
    /// `[K, V]`
    s: Vec<f64>,
    /// `[K]`
    z: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
