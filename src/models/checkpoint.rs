//! The weights of a checkpoint folder, one file or several, with errors that name the file and the tensor.

use crate::memory;
use crate::models::registry::Parsed;
use crate::nn::read_dtype;
use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Error, Result, Shape, Tensor, bail};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// How much of a checkpoint has been loaded, in bytes as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Read so far.
    pub done: u64,
    /// What the files hold. Parts of a repository that a model has no use for are never read.
    pub total: u64,
}

/// Who wants to know.
pub(super) type Report = Arc<dyn Fn(Progress) + Send + Sync>;

/// The tensors of a folder, read when they are asked for.
pub(super) struct Checkpoint {
    /// What tells where a missing tensor should have been.
    listing: PathBuf,
    files: Vec<WeightFile>,
    /// The file that each tensor is in.
    routing: HashMap<String, usize>,
    dtype: DType,
    total: u64,
    done: AtomicU64,
    report: Option<Report>,
}

struct WeightFile {
    path: PathBuf,
    tensors: MmapedSafetensors,
}

impl Checkpoint {
    pub fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        let (listing, files, routing) = if single.is_file() {
            let file = WeightFile::open(single.clone())?;
            let routing = file.tensors.tensors().into_iter().map(|(name, _)| (name, 0)).collect();
            (single, vec![file], routing)
        } else if index.is_file() {
            let (files, routing) = open_shards(folder, &index)?;
            (index, files, routing)
        } else {
            bail!("{}: holds neither {SINGLE} nor {INDEX}", folder.display())
        };
        let dtype = main_dtype(&files);
        let tensors = || files.iter().flat_map(|file| file.tensors.tensors());
        let total = tensors().map(|(_, view)| view.data().len() as u64).sum();
        Ok(Self { listing, files, routing, dtype, total, done: AtomicU64::new(0), report: None })
    }

    /// What the files hold, in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Reports every tensor that is read from here on.
    pub fn reporting(self, report: Report) -> Self {
        report(Progress { done: 0, total: self.total });
        Self { report: Some(report), ..self }
    }

    fn read(&self, bytes: usize) {
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if let Some(report) = &self.report {
            // A tensor that is asked for under two names is read twice.
            report(Progress { done: done.min(self.total), total: self.total });
        }
    }

    /// Refuses the file of a deeper model, which would give another result without its last layers.
    pub fn check_layers(&self, config: &Parsed) -> Result<()> {
        let layer = |name: &str| {
            let layers =
                config.models.iter().find_map(|model| name.strip_prefix(model)?.strip_prefix(".layers."));
            layers?.split('.').next()?.parse::<usize>().ok()
        };
        let beyond = self.routing.keys().filter_map(|name| Some((layer(name)?, name)));
        match beyond.filter(|(layer, _)| *layer >= config.num_layers).min() {
            Some((_, name)) => bail!(
                "{}: tensor `{name}` is of a layer that the configuration does not have, its `num_hidden_layers` is {}",
                self.listing.display(),
                config.num_layers
            ),
            None => Ok(()),
        }
    }

    /// The dtype that most of the weights are stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The file that holds a tensor, and the tensor's shape.
    fn find(&self, name: &str) -> Result<(&WeightFile, Vec<usize>)> {
        let Some(&file) = self.routing.get(name) else {
            bail!("{}: tensor `{name}` is missing", self.listing.display())
        };
        let file = &self.files[file];
        match file.tensors.get(name) {
            Ok(view) => Ok((file, view.shape().to_vec())),
            Err(_) => {
                bail!("{}: tensor `{name}` is missing, though {INDEX} says it is here", file.path.display())
            }
        }
    }
}

impl SimpleBackend for Checkpoint {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let (file, found) = self.find(name)?;
        if found != shape.dims() {
            let path = file.path.display();
            bail!("{path}: tensor `{name}` has shape {found:?}, the configuration says {:?}", shape.dims());
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (file, _) = self.find(name)?;
        let view = file.tensors.get(name)?;
        match DType::try_from(view.dtype()) {
            // Converted where it is read, so that a device never holds both copies.
            Ok(stored @ (DType::F32 | DType::F16 | DType::BF16 | DType::F64)) => {
                let tensor = view.load(&Device::Cpu)?;
                // SAFETY: Candle maps the files of a checkpoint for reading alone.
                unsafe { memory::release_mapped(view.data()) };
                self.read(view.data().len());
                tensor.to_dtype(read_dtype(stored, dtype))?.to_device(device)
            }
            _ => bail!(
                "{}: tensor `{name}` has dtype {:?}, it must be F32, F16 or BF16",
                file.path.display(),
                view.dtype()
            ),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.routing.contains_key(name)
    }
}

impl WeightFile {
    fn open(path: PathBuf) -> Result<Self> {
        // SAFETY: the file is mapped, and must not change while it is; `Model::load` says so.
        let tensors = match unsafe { MmapedSafetensors::new(&path) } {
            Ok(tensors) => tensors,
            Err(error) => bail!("{}: not a whole safetensors file ({})", path.display(), reason(error)),
        };
        Ok(Self { path, tensors })
    }
}

/// Candle puts the path into its error; the message has it in front already.
fn reason(error: Error) -> Error {
    match error {
        Error::WithPath { inner, .. } | Error::WithBacktrace { inner, .. } => reason(*inner),
        error => error,
    }
}

/// The files that an index lists, and the file of each tensor.
fn open_shards(folder: &Path, index: &Path) -> Result<(Vec<WeightFile>, HashMap<String, usize>)> {
    let weight_map = read_index(index)?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    let numbers: HashMap<&String, usize> =
        names.iter().enumerate().map(|(number, name)| (*name, number)).collect();
    let routing = weight_map.iter().map(|(tensor, file)| (tensor.clone(), numbers[file])).collect();
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let path = folder.join(name);
        if !path.is_file() {
            bail!("{}: lists {name}, which is not in the folder", index.display());
        }
        files.push(WeightFile::open(path)?);
    }
    Ok((files, routing))
}

/// The `weight_map` of an index: tensor to file. File names that would lead out of the folder are refused.
pub(super) fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let shown = index.display();
    let text = match std::fs::read_to_string(index) {
        Ok(text) => text,
        Err(error) => bail!("{shown}: cannot be read: {error}"),
    };
    let value: Value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(error) => bail!("{shown}: not valid JSON: {error}"),
    };
    let Some(map) = value["weight_map"].as_object().filter(|map| !map.is_empty()) else {
        bail!("{shown}: field `weight_map` must be an object that gives the file of each tensor")
    };
    let mut weight_map = BTreeMap::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(file) if is_plain_name(file) => weight_map.insert(tensor.clone(), file.to_string()),
            _ => bail!(
                "{shown}: field `weight_map` gives {file} for `{tensor}`, it must be the name of a file beside it"
            ),
        };
    }
    Ok(weight_map)
}

fn is_plain_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let first = components.next();
    matches!(first, Some(Component::Normal(_))) && components.next().is_none() && !file.contains(['/', '\\'])
}

fn main_dtype(files: &[WeightFile]) -> DType {
    let mut sizes = [(DType::F32, 0), (DType::F16, 0), (DType::BF16, 0)];
    for (_, view) in files.iter().flat_map(|file| file.tensors.tensors()) {
        let dtype = DType::try_from(view.dtype()).ok();
        if let Some((_, size)) = sizes.iter_mut().find(|(known, _)| Some(*known) == dtype) {
            *size += view.shape().iter().product::<usize>();
        }
    }
    // Of equals the first, f32, also when there is none of the three.
    sizes.iter().rev().max_by_key(|(_, size)| *size).map_or(DType::F32, |(dtype, _)| *dtype)
}
