//! Files that are either the old version or the new one, never half of it, whenever the process is killed.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, backend::BackendStorage};
use pulp::bytemuck::cast_slice;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

const PARTIAL: &str = ".partial-";

/// A temporary file, to be renamed when it is whole.
fn partial_file(folder: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(PARTIAL)
        .tempfile_in(folder)
        .with_context(|| format!("cannot create a file in {}", folder.display()))
}

/// Removes what a killed process was in the middle of writing.
pub fn remove_partial_files(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes a file under a temporary name in the same folder, then renames it.
///
/// There is no fsync: a killed process loses nothing that way (the pages are the kernel's by then), and a checkpoint a step
/// could not be afforded with one.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    write_atomically_with(path, |file| Ok(file.write_all(contents)?))
}

/// The same with the contents in pieces. What is no file, a pipe or a device, is written to; a link stays one.
pub fn write_atomically_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        let mut file = File::options().write(true).open(path).with_context(failed)?;
        return write(&mut file).with_context(failed);
    }
    let path = &end_of_links(path);
    let folder = path.parent().context("a file needs a folder")?;
    let mut file = partial_file(folder)?;
    write(file.as_file_mut()).with_context(failed)?;
    make_readable(file.as_file())?;
    file.persist(path).with_context(failed)?;
    Ok(())
}

/// What a path leads to, whether or not anything is there.
fn end_of_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    // As many as Linux follows: links may go in a circle.
    for _ in 0..40 {
        match std::fs::read_link(&path) {
            Ok(target) => path.set_file_name(target),
            Err(_) => break,
        }
    }
    path
}

/// A temporary file is created for its owner alone; what it becomes is an ordinary file.
#[cfg(unix)]
fn make_readable(file: &File) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    Ok(())
}

#[cfg(not(unix))]
fn make_readable(_: &File) -> Result<()> {
    Ok(())
}

/// Writes tensors and metadata in the safetensors format, atomically.
///
/// candle's own writer has no place for metadata, and readers in Python want `format` there.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut header = BTreeMap::from([("__metadata__", json!(metadata))]);
    let mut end = 0;
    for (name, tensor) in tensors {
        let start = end;
        end += tensor.elem_count() * tensor.dtype().size_in_bytes();
        header.insert(
            name,
            json!({
                "dtype": dtype_name(tensor.dtype())?,
                "shape": tensor.dims(),
                "data_offsets": [start, end],
            }),
        );
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        tensors.iter().try_for_each(|(_, tensor)| write_values(file, tensor))
    })
}

fn dtype_name(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        other => bail!("cannot store dtype {other:?}: expected f32, f16 or bf16"),
    })
}

/// The values go to the kernel from where they are: a copy for each step of a training run would cost more than the write.
fn write_values(file: &mut File, tensor: &Tensor) -> Result<()> {
    const { assert!(cfg!(target_endian = "little"), "safetensors are little-endian") };
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("cannot store a tensor that is not contiguous on the cpu");
    };
    let bytes: &[u8] = match storage {
        CpuStorage::F32(values) => cast_slice(&values[start..end]),
        CpuStorage::F16(values) => cast_slice(&values[start..end]),
        CpuStorage::BF16(values) => cast_slice(&values[start..end]),
        other => bail!("cannot store dtype {:?}: expected f32, f16 or bf16", other.dtype()),
    };
    Ok(file.write_all(bytes)?)
}

/// The metadata of a safetensors file.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).with_context(|| format!("{} is cut off", path.display()))?;
    let length = u64::from_le_bytes(length);
    ensure!(length <= file.metadata()?.len(), "{} is cut off or is no safetensors file", path.display());
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    let header: Value = serde_json::from_slice(&header)
        .with_context(|| format!("{} is no safetensors file", path.display()))?;
    Ok(serde_json::from_value(header["__metadata__"].clone()).unwrap_or_default())
}
