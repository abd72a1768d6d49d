//! A sweep token by token, as the definition reads. Decoding is this.

use pulp::{Arch, Simd, WithSimd};

use super::exp::exp_in_place;
use super::sweep::{Gate, Sweep};

pub(super) fn run(sweep: &Sweep, state: &mut [f32]) {
    Arch::new().dispatch(Recurrent { sweep, state });
}

struct Recurrent<'s, 'a> {
    sweep: &'s Sweep<'a>,
    state: &'s mut [f32],
}

impl WithSimd for Recurrent<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sweep, state } = self;
        let mut read = vec![0.; sweep.rows];
        let mut write = vec![0.; sweep.rows];
        let mut value = vec![0.; sweep.cols];
        let mut out = vec![0.; sweep.cols];
        let mut row_decay = vec![1.; sweep.rows];
        let mut col_decay = vec![1.; sweep.cols];
        for i in 0..sweep.tokens.len() {
            let t = sweep.token(i);
            load_decay(sweep, i, &mut row_decay, &mut col_decay);
            sweep.read.load(t, &mut read);
            sweep.write.load(t, &mut write);
            sweep.value.load(t, &mut value);
            out.fill(0.);
            for (r, s) in state.chunks_exact_mut(sweep.cols).enumerate() {
                let (q, w) = (read[r] * sweep.read_scale, write[r] * sweep.write_scale);
                let row =
                    Row { decay: row_decay[r], col_decay: &col_decay, read: q, write: w, value: &value };
                if sweep.inclusive {
                    row.step::<S, true>(simd, s, &mut out);
                } else {
                    row.step::<S, false>(simd, s, &mut out);
                }
            }
            sweep.out.store(t, &out);
        }
        sweep.fade(state, sweep.tokens.len());
    }
}

/// The factors on the state that are due before step `i`.
#[inline(always)]
fn load_decay(sweep: &Sweep, i: usize, rows: &mut [f32], cols: &mut [f32]) {
    let Some(t) = sweep.decay_before(i) else {
        return;
    };
    match sweep.gate {
        Gate::None => {}
        Gate::Scalar(g) => {
            let mut one = [0.];
            g.load(t, &mut one);
            exp_in_place(&mut one);
            rows.fill(one[0]);
        }
        Gate::Rows(g) => {
            g.load(t, rows);
            exp_in_place(rows);
        }
        Gate::Cols(g) => {
            g.load(t, cols);
            exp_in_place(cols);
        }
    }
}

/// What one token does to one row of the state.
struct Row<'a> {
    decay: f32,
    col_decay: &'a [f32],
    read: f32,
    write: f32,
    value: &'a [f32],
}

impl Row<'_> {
    #[inline(always)]
    fn step<S: Simd, const INCLUSIVE: bool>(&self, simd: S, state: &mut [f32], out: &mut [f32]) {
        let (s, s_tail) = S::as_mut_simd_f32s(state);
        let (o, o_tail) = S::as_mut_simd_f32s(out);
        let (v, v_tail) = S::as_simd_f32s(self.value);
        let (c, c_tail) = S::as_simd_f32s(self.col_decay);
        let [d, q, w] = [self.decay, self.read, self.write].map(|x| simd.splat_f32s(x));
        for (((s, o), v), c) in s.iter_mut().zip(o).zip(v).zip(c) {
            let old = simd.mul_f32s(simd.mul_f32s(*s, d), *c);
            *s = simd.mul_add_e_f32s(w, *v, old);
            *o = simd.mul_add_e_f32s(q, if INCLUSIVE { *s } else { old }, *o);
        }
        for (((s, o), v), c) in s_tail.iter_mut().zip(o_tail).zip(v_tail).zip(c_tail) {
            let old = *s * self.decay * c;
            *s = self.write * v + old;
            *o += self.read * if INCLUSIVE { *s } else { old };
        }
    }
}
