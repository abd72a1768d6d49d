//! A model, whatever its kind.

use crate::Mode;
use crate::models::cache::Cache;
use crate::models::checkpoint::{Checkpoint, Progress};
use crate::models::config::Config;
use crate::models::pool::Pool;
use crate::models::registry::CausalLm;
use crate::models::workers::on_a_worker;
use crate::nn::{Keeping, Quantization, keeping};
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use std::path::Path;
use std::sync::Arc;

/// How a checkpoint is loaded.
#[derive(Clone, Default)]
pub struct LoadOptions {
    /// Of parameters, activations and logits: f32, f16 or bf16; as stored unless given.
    pub dtype: Option<DType>,
    /// Quantizes projections and embeddings, one matrix after the other; none unless given.
    pub quantize: Option<Quantization>,
    /// Is told how far it is, for a bar that shows it: at the beginning, behind every tensor and, when all is there, with
    /// `done` equal to `total`.
    pub progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

/// More are enough work for what is between two products not to matter.
const FEW_TOKENS: usize = 64;

/// A causal language model.
pub struct Model {
    config: Config,
    inner: Box<dyn CausalLm>,
    dtype: DType,
    device: Device,
}

impl Model {
    /// Makes a model from the parameters of `vb`, in its dtype and on its device. Over a
    /// [`VarMap`](candle_nn::VarMap) the parameters are fresh, and every one of them can be trained: projections and
    /// embeddings normal with the deviation `initializer_range`, biases 0, norms 1.
    ///
    /// Where `vb` gives parameters in f32 although its dtype has 16 bits, as one over a `VarMap` does that has them already,
    /// the model computes in 16 bits and converts each parameter where it is used. That is training in mixed precision:
    /// gradients arrive in f32.
    ///
    /// # Errors
    /// Sizes that do not divide, by the name of the field; whatever `vb` has to say of a tensor.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        check_dtype(dtype)?;
        Ok(Self { config: config.clone(), inner: (config.parsed().build)(vb)?, dtype, device })
    }

    /// Loads a checkpoint: a folder with `config.json` and the weights, `model.safetensors` or, in several files, those
    /// that `model.safetensors.index.json` lists.
    ///
    /// `dtype` is f32, f16 or bf16; `None` means as stored. On a CPU, matrices stored in 16 bits stay so in memory if f32
    /// is asked for, with the same results. The files are mapped while they are read and must not be changed meanwhile.
    ///
    /// # Errors
    /// By the path of the file: one that is missing, truncated or corrupt; a field of `config.json` by its name; a tensor
    /// that is missing, whose shape is not what the configuration says, or of a layer beyond those that it says, by its name.
    pub fn load(folder: impl AsRef<Path>, dtype: Option<DType>, device: &Device) -> Result<Self> {
        Self::load_with(folder, device, LoadOptions { dtype, ..LoadOptions::default() })
    }

    /// [`load`](Self::load) with more to choose.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn load_with(folder: impl AsRef<Path>, device: &Device, options: LoadOptions) -> Result<Self> {
        let LoadOptions { dtype, quantize, progress } = options;
        let folder = folder.as_ref();
        if !folder.is_dir() {
            bail!("{}: not a folder; it must hold config.json and model.safetensors", folder.display());
        }
        if let Some(dtype) = dtype {
            check_dtype(dtype)?;
        }
        let config = Config::from_file(folder.join("config.json"))?;
        let checkpoint = Checkpoint::open(folder)?;
        checkpoint.check_layers(config.parsed())?;
        let dtype = dtype.unwrap_or(checkpoint.dtype());
        let total = checkpoint.total();
        let checkpoint = match &progress {
            Some(progress) => checkpoint.reporting(progress.clone()),
            None => checkpoint,
        };
        let vb = VarBuilder::from_backend(Box::new(checkpoint), dtype, device.clone());
        // Only a CPU has a product of f32 and weights of 16 bits.
        let model = keeping(Keeping { stored: device.is_cpu(), quantize }, || Self::new(&config, vb))?;
        if let Some(progress) = progress {
            progress(Progress { done: total, total });
        }
        Ok(model)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The dtype of activations and logits, and of parameters as they are asked for. States are f32 whatever it is.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The algorithm of every layer's operator. Default: [`Mode::Auto`].
    pub fn set_mode(&mut self, mode: Mode) {
        self.inner.set_mode(mode);
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> Cache {
        self.inner.new_cache()
    }

    /// An empty pool for the states of up to `slots` sequences.
    pub fn new_pool(&self, slots: usize) -> Pool {
        Pool::new(self.new_cache().len(), slots)
    }

    /// `input_ids: [B, T]`, u32, to `[B, T, hidden_size]`, behind the last norm. With a cache, the tokens continue what
    /// the cache has seen; any split of a sequence into pieces gives the same result.
    ///
    /// # Errors
    /// A wrong shape or dtype, no tokens, a token id that is not in the vocabulary; a cache of another model or batch
    /// size.
    pub fn hidden_states(&self, input_ids: &Tensor, cache: Option<&mut Cache>) -> Result<Tensor> {
        self.check_ids(input_ids)?;
        self.run(input_ids.elem_count(), || self.inner.hidden_states(input_ids, None, cache))
    }

    /// [`hidden_states`](Self::hidden_states) of N sequences of different lengths at once: they lie one after the other in
    /// `input_ids: [1, T]`, sequence i from `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Some may be empty. The cache is one of
    /// N sequences.
    ///
    /// # Errors
    /// Those of `hidden_states`; `cu_seqlens` that does not begin with 0, decreases or does not end at T.
    pub fn hidden_states_packed(
        &self,
        input_ids: &Tensor,
        cu_seqlens: &[u32],
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        self.check_ids(input_ids)?;
        self.run(input_ids.elem_count(), || self.inner.hidden_states(input_ids, Some(cu_seqlens), cache))
    }

    /// The head: `[.., hidden_size]` to `[.., vocab_size]`. To pick the next token, give it the last position alone.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match hidden.dims() {
            [rest @ .., last] if *last == self.config.hidden_size() => {
                self.run(rest.iter().product(), || self.inner.logits(hidden))
            }
            dims => bail!("hidden: shape is {dims:?}, it must end in {}", self.config.hidden_size()),
        }
    }

    /// [`hidden_states`](Self::hidden_states), then [`logits`](Self::logits): `[B, T]` to `[B, T, vocab_size]`.
    pub fn forward(&self, input_ids: &Tensor, cache: Option<&mut Cache>) -> Result<Tensor> {
        self.logits(&self.hidden_states(input_ids, cache)?)
    }

    /// Over few tokens the threads wait for each other so often that it matters where that is.
    fn run<R: Send>(&self, tokens: usize, pass: impl FnOnce() -> R + Send) -> R {
        if self.device.is_cpu() && tokens <= FEW_TOKENS { on_a_worker(pass) } else { pass() }
    }

    /// A backend's lookup would answer an id outside the table with a puzzling error at best.
    fn check_ids(&self, input_ids: &Tensor) -> Result<()> {
        match *input_ids.dims() {
            [batch, tokens] if batch > 0 && tokens > 0 => {}
            _ => {
                bail!("input_ids: shape is {:?}, it must be [B, T] with B and T at least 1", input_ids.dims())
            }
        }
        if !matches!(input_ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
            bail!("input_ids: dtype is {:?}, it must be U32", input_ids.dtype());
        }
        let ids = input_ids.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let known = 0..self.config.vocab_size() as i64;
        match ids.iter().find(|id| !known.contains(id)) {
            Some(id) => bail!("input_ids: token {id}, it must be below the vocabulary size {}", known.end),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { config, dtype, device, .. } = self;
        f.debug_struct("Model").field("config", config).field("dtype", dtype).field("device", device).finish()
    }
}

fn check_dtype(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        _ => bail!("dtype is {dtype:?}, it must be F32, F16 or BF16"),
    }
}
