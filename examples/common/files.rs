//! Files that are either the old version or the new one, never half of it, whenever the process is killed.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    path::Path,
};

/// Writes a file under a temporary name in the same folder, then renames it.
///
/// There is no fsync: a killed process loses nothing that way (the pages are the kernel's by then), and a checkpoint a step
/// could not be afforded with one.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file needs a folder")?;
    let mut file = tempfile::Builder::new()
        .prefix(".partial-")
        .tempfile_in(folder)
        .with_context(|| format!("cannot create a file in {}", folder.display()))?;
    file.write_all(contents)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let file = file
        .persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    make_readable(&file)
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
    let mut contents = Vec::with_capacity(8 + header.len() + end);
    contents.extend((header.len() as u64).to_le_bytes());
    contents.extend(header);
    for (_, tensor) in tensors {
        append_bytes(&mut contents, tensor)?;
    }
    write_atomically(path, &contents)
}

fn dtype_name(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        other => bail!("cannot store dtype {other:?}: expected f32, f16 or bf16"),
    })
}

fn append_bytes(contents: &mut Vec<u8>, tensor: &Tensor) -> Result<()> {
    let flat = tensor.flatten_all()?.to_device(&Device::Cpu)?;
    match flat.dtype() {
        DType::F32 => extend(contents, &flat.to_vec1::<f32>()?, |x| x.to_le_bytes()),
        DType::F16 => extend(contents, &flat.to_vec1::<half::f16>()?, |x| x.to_le_bytes()),
        DType::BF16 => extend(contents, &flat.to_vec1::<half::bf16>()?, |x| {
            x.to_le_bytes()
        }),
        other => bail!("cannot store dtype {other:?}: expected f32, f16 or bf16"),
    }
    Ok(())
}

/// One resize and a loop over chunks becomes a plain copy; collecting an iterator of bytes does not.
fn extend<T: Copy, const N: usize>(
    contents: &mut Vec<u8>,
    values: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) {
    let start = contents.len();
    contents.resize(start + N * values.len(), 0);
    for (bytes, &value) in contents[start..].chunks_exact_mut(N).zip(values) {
        bytes.copy_from_slice(&to_bytes(value));
    }
}

/// The metadata of a safetensors file.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .with_context(|| format!("{} is cut off", path.display()))?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= file.metadata()?.len(),
        "{} is cut off or is no safetensors file",
        path.display()
    );
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    let header: Value = serde_json::from_slice(&header)
        .with_context(|| format!("{} is no safetensors file", path.display()))?;
    Ok(serde_json::from_value(header["__metadata__"].clone()).unwrap_or_default())
}
