//! Parameters that a model asks for by name, made from a seed and remembered.

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::{
    Init,
    init::NormalOrUniform,
    var_builder::{SimpleBackend, VarBuilder},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeMap,
    f64::consts::TAU,
    sync::{Arc, Mutex},
};

/// Every parameter of a model, by name, in the order of the names: in f32, whatever the model computes in. A layer converts
/// what it uses where it uses it, so that gradients arrive in f32 too, and those of an embedding are summed in it.
///
/// candle's `VarMap` would do but for its random numbers, which have no seed on a CPU. Here the values depend on the seed
/// and the name alone, whatever the device and the order in which they are asked for.
#[derive(Clone)]
pub struct Parameters {
    seed: u64,
    vars: Arc<Mutex<BTreeMap<String, Var>>>,
    frozen: bool,
}

impl Parameters {
    pub fn new(seed: u64) -> Self {
        Self { seed, vars: Arc::default(), frozen: false }
    }

    /// The same ones for a model that is not to be trained: its states would otherwise hold the whole graph.
    pub fn frozen(&self) -> Self {
        Self { frozen: true, ..self.clone() }
    }

    /// For building a model that computes in `dtype` and whose parameters end up here.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    pub fn vars(&self) -> BTreeMap<String, Var> {
        self.vars.lock().unwrap().clone()
    }

    /// The values alone.
    pub fn detached(&self) -> BTreeMap<String, Tensor> {
        let vars = self.vars.lock().unwrap();
        vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    }

    /// A parameter that there is no memory for would end the process. It comes with two moments and a gradient.
    fn check_memory(&self, shape: &Shape, name: &str) -> Result<()> {
        let numbers = shape.dims().iter().try_fold(4usize, |product, &size| product.checked_mul(size));
        if numbers.is_none_or(|numbers| Vec::<f32>::new().try_reserve_exact(numbers).is_err()) {
            bail!("parameter {name}: there is not enough memory to train {:?} numbers", shape.dims());
        }
        Ok(())
    }

    fn tensor(&self, var: &Var) -> Tensor {
        if self.frozen { var.as_detached_tensor() } else { var.as_tensor().clone() }
    }

    fn make(&self, shape: Shape, name: &str, init: Init, device: &Device) -> Result<Var> {
        self.check_memory(&shape, name)?;
        let seed = self.seed ^ crate::data::fingerprint(name.as_bytes());
        let values = initial_values(&shape, init, &mut StdRng::seed_from_u64(seed));
        Var::from_tensor(&Tensor::from_vec(values, shape, device)?)
    }
}

impl SimpleBackend for Parameters {
    fn get(&self, shape: Shape, name: &str, init: Init, _: DType, device: &Device) -> Result<Tensor> {
        let mut vars = self.vars.lock().unwrap();
        if let Some(var) = vars.get(name) {
            if var.shape() != &shape {
                bail!("parameter {name}: shape is {:?}, asked for as {shape:?}", var.shape());
            }
            return Ok(self.tensor(var));
        }
        let var = self.make(shape, name, init, device)?;
        let tensor = self.tensor(&var);
        vars.insert(name.to_owned(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.vars.lock().unwrap().get(name) {
            Some(var) => Ok(self.tensor(var)),
            None => bail!("parameter {name} does not exist yet"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars.lock().unwrap().contains_key(name)
    }
}

fn initial_values(shape: &Shape, init: Init, rng: &mut StdRng) -> Vec<f32> {
    let len = shape.elem_count();
    match init {
        Init::Const(x) => vec![x as f32; len],
        Init::Uniform { lo, up } => uniform(len, lo, up, rng),
        Init::Randn { mean, stdev } => normal(len, mean, stdev, rng),
        Init::Kaiming { dist, fan, non_linearity } => {
            let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => normal(len, 0.0, stdev, rng),
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * stdev;
                    uniform(len, -bound, bound, rng)
                }
            }
        }
    }
}

fn uniform(len: usize, lo: f64, up: f64, rng: &mut StdRng) -> Vec<f32> {
    (0..len).map(|_| (lo + (up - lo) * rng.random::<f64>()) as f32).collect()
}

/// Box and Muller's method.
fn normal(len: usize, mean: f64, stdev: f64, rng: &mut StdRng) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            let angle = TAU * rng.random::<f64>();
            (mean + stdev * radius * angle.cos()) as f32
        })
        .collect()
}
