//! A sweep token by token: one pass over the state for what is read, one for what is written. Decoding is this.

use pulp::{Arch, Simd, WithSimd};

use super::sweep::{DeltaSweep, Step};

pub(super) fn run(sweep: &DeltaSweep, state: &mut [f32]) {
    Arch::new().dispatch(Recurrent { sweep, state });
}

struct Recurrent<'s, 'a> {
    sweep: &'s DeltaSweep<'a>,
    state: &'s mut [f32],
}

impl WithSimd for Recurrent<'_, '_> {
    type Output = ();

    /// Plain loops: within a function for the vector unit at hand the compiler makes vector code of them.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { sweep, state } = self;
        let mut step = Step::new(sweep);
        let [mut value, mut w, mut y, mut c] = [(); 4].map(|()| vec![0.; sweep.cols]);
        for i in 0..sweep.tokens.len() {
            let t = sweep.token(i);
            step.load(sweep, t);
            sweep.value.load(t, &mut value);
            read(state, &step.r1, &mut w);
            match sweep.out {
                Some(_) => read(state, &step.r2, &mut y),
                None => y.fill(0.),
            }
            step.factors.combine(&value, &mut w, &mut y, &mut c);
            for (r, row) in state.chunks_exact_mut(sweep.cols).enumerate() {
                let decay = step.decay_of(r);
                let x = step.x2[r];
                row.iter_mut().zip(&c).for_each(|(s, c)| *s = decay * *s + x * c);
                if sweep.writes_value() {
                    let x = step.x1[r];
                    row.iter_mut().zip(&value).for_each(|(s, v)| *s += x * v);
                }
            }
            sweep.inner.inspect(|inner| inner.store(t, &w));
            sweep.out.inspect(|out| out.store(t, &y));
        }
    }
}

/// `sums = state^T by`
#[inline(always)]
fn read(state: &[f32], by: &[f32], sums: &mut [f32]) {
    sums.fill(0.);
    for (row, by) in state.chunks_exact(sums.len()).zip(by) {
        sums.iter_mut().zip(row).for_each(|(sum, s)| *sum += by * s);
    }
}
