//! The graph with tokens that are not read, as on a GPU. Whatever tests in `tests/ops/graph.rs` say of the operators on the
//! CPU must hold there too, but for passes within one another.

use candle_core::{Device, Var};

use super::*;

/// Results `x y`, `2 x + y` and `3 z`.
struct Three;

impl Function for Three {
    fn name(&self) -> &'static str {
        "three"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let [x, y, z] = [0, 1, 2].map(|i| inputs[i].to_vec1::<f32>());
        let (x, y, z) = (x?, y?, z?);
        let both = || x.iter().zip(&y);
        let results: [Vec<f32>; 3] = [
            both().map(|(x, y)| x * y).collect(),
            both().map(|(x, y)| 2. * x + y).collect(),
            z.iter().map(|z| 3. * z).collect(),
        ];
        Ok(results.map(|r| (Storage::Cpu(CpuStorage::F32(r.clone())), Shape::from(r.len()))).into())
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = |i: usize| grads[i].clone().map_or_else(|| inputs[0].zeros_like(), Ok);
        let (a, b, c) = (grad(0)?, grad(1)?, grad(2)?);
        let all = [(&a * &inputs[1])? + (&b * 2.)?, (&a * &inputs[0])? + &b, c * 3.];
        all.into_iter().zip(wanted).map(|(grad, wanted)| wanted.then_some(grad).transpose()).collect()
    }
}

struct Graph {
    vars: [Var; 3],
    results: Vec<Tensor>,
}

impl Graph {
    fn new(readable: bool) -> Self {
        let vars = [2f32, 5., 7.].map(|x| Var::new(&[x], &Device::Cpu).unwrap());
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let results = apply_with(Three, &inputs, readable).unwrap();
        Self { vars, results }
    }

    /// The gradients of the variables, 0 where there is none, for the sum of some results.
    fn gradients(&self, of: &[usize]) -> [f32; 3] {
        let terms: Vec<Tensor> = of.iter().map(|&i| self.results[i].clone()).collect();
        let store = Tensor::cat(&terms, 0).unwrap().sum_all().unwrap().backward().unwrap();
        [0, 1, 2].map(|i| match store.get(&self.vars[i]) {
            Some(grad) => grad.to_vec1::<f32>().unwrap()[0],
            None => 0.,
        })
    }
}

/// Of [`Graph::gradients`].
fn expected(of: &[usize]) -> [f32; 3] {
    let mut sum = [0.; 3];
    for &i in of {
        let one = [[5., 2., 0.], [2., 1., 0.], [0., 0., 3.]][i];
        sum = std::array::from_fn(|j| sum[j] + one[j]);
    }
    sum
}

const SETS: [&[usize]; 7] = [&[0, 1, 2], &[0], &[1], &[2], &[2, 0], &[1, 2], &[0, 1]];

#[test]
fn losses_on_different_results_do_not_mix() {
    for readable in [true, false] {
        let graph = Graph::new(readable);
        for of in SETS.iter().chain(SETS.iter().rev()) {
            assert_eq!(graph.gradients(of), expected(of), "{of:?}, readable: {readable}");
        }
    }
}

/// An op without a backward.
struct OneWay;

impl CustomOp1 for OneWay {
    fn name(&self) -> &'static str {
        "one-way"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }
}

#[test]
fn a_failed_backward_leaves_nothing_behind() {
    for readable in [true, false] {
        for (fine, bad) in [(0, 1), (1, 0), (2, 0), (0, 2), (1, 2)] {
            let graph = Graph::new(readable);
            let failing = graph.results[bad].apply_op1(OneWay).unwrap();
            for terms in [[&graph.results[fine], &failing], [&failing, &graph.results[fine]]] {
                let loss = Tensor::cat(&terms, 0).unwrap().sum_all().unwrap();
                assert!(loss.backward().is_err());
            }
            assert_eq!(graph.gradients(&[bad]), expected(&[bad]), "{fine} fine, {bad} bad, {readable}");
        }
    }
}

#[test]
fn threads_differentiate_one_graph() {
    let graph = Graph::new(false);
    std::thread::scope(|scope| {
        for of in SETS {
            let graph = &graph;
            scope.spawn(move || {
                for _ in 0..200 {
                    assert_eq!(graph.gradients(of), expected(of), "{of:?}");
                }
            });
        }
    });
}

/// The identity, whose backward runs another one.
struct Interrupt(Tensor);

impl CustomOp1 for Interrupt {
    fn name(&self) -> &'static str {
        "interrupt"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.backward()?;
        Ok(Some(grad.clone()))
    }
}

#[test]
fn a_backward_that_repeats_one_within_which_it_runs_is_refused() {
    let graph = Graph::new(false);
    let interrupt = || Interrupt(graph.results[0].sum_all().unwrap());
    let interrupted = graph.results[1].apply_op1(interrupt()).unwrap();
    for terms in [[&graph.results[0], &interrupted], [&interrupted, &graph.results[0]]] {
        let loss = Tensor::cat(&terms, 0).unwrap().sum_all().unwrap();
        match loss.backward() {
            Ok(store) => {
                let grad = store.get(&graph.vars[0]).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(grad[0], expected(&[0, 1])[0]);
            }
            Err(e) => assert!(e.to_string().contains("within another"), "{e}"),
        }
    }
}
