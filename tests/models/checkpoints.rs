//! Checkpoints that are not right are refused, and the message says where; old and split ones load.

use crate::support::*;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::models::Model;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A copy of a golden checkpoint to break.
fn copy_of(name: &str) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden_folder(name).join(file), folder.path().join(file))?;
    }
    Ok(folder)
}

fn load(folder: &TempDir) -> Result<Model> {
    Model::load(folder.path(), None, &CPU)
}

fn tensors(folder: &TempDir) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(folder.path().join("model.safetensors"), &CPU)
}

/// The tensors in two files and an index, instead of the one file.
fn shard(folder: &TempDir) -> Result<()> {
    let path = |name: &str| folder.path().join(name);
    let tensors = tensors(folder)?;
    let (first, second): (HashMap<_, _>, HashMap<_, _>) =
        tensors.into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut weight_map = serde_json::Map::new();
    for (number, part) in [(1, first), (2, second)] {
        let file = format!("model-0000{number}-of-00002.safetensors");
        weight_map.extend(part.keys().map(|name| (name.clone(), file.clone().into())));
        candle_core::safetensors::save(&part, path(&file))?;
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(path("model.safetensors.index.json"), index.to_string())?;
    fs::remove_file(path("model.safetensors"))?;
    Ok(())
}

fn golden_logits(model: &Model, name: &str) -> Result<()> {
    let golden = candle_core::safetensors::load(golden_folder(name).join("golden.safetensors"), &CPU)?;
    let logits = model.forward(&golden["input_ids"], None)?;
    assert_close(name, &logits, &golden["logits"], 1e-4)
}

#[test]
fn several_files_with_an_index_load_like_one() -> Result<()> {
    let folder = copy_of("gla")?;
    shard(&folder)?;
    golden_logits(&load(&folder)?, "gla")
}

/// Before February 2025 the MLP's gate and up projections were one tensor.
#[test]
fn the_old_layout_of_the_mlp_loads() -> Result<()> {
    for name in ["gla", "retnet", "hgrn2", "delta_net", "gated_deltanet", "kda"] {
        let folder = copy_of(name)?;
        let mut tensors = tensors(&folder)?;
        for layer in 0..3 {
            let name = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj.weight");
            let Some(up) = tensors.remove(&name("up")) else { continue };
            let both = Tensor::cat(&[&tensors[&name("gate")], &up], 0)?;
            tensors.insert(name("gate"), both);
        }
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
        golden_logits(&load(&folder)?, name)?;
    }
    Ok(())
}

/// A golden checkpoint whose tensors have been given other names or forms.
fn changed(name: &str, change: impl Fn(&mut HashMap<String, Tensor>) -> Result<()>) -> Result<TempDir> {
    let folder = copy_of(name)?;
    let mut tensors = tensors(&folder)?;
    change(&mut tensors)?;
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    Ok(folder)
}

fn rename(tensors: &mut HashMap<String, Tensor>, from: &str, to: &str) {
    let tensor = tensors.remove(from).unwrap_or_else(|| panic!("{from} is not there"));
    tensors.insert(to.into(), tensor);
}

/// Norms inside of what they precede, and gate and up in one tensor besides.
#[test]
fn early_delta_nets_load() -> Result<()> {
    let folder = changed("delta_net", |tensors| {
        for layer in 0..2 {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            rename(tensors, &name("attn_norm"), &name("attn.norm"));
            rename(tensors, &name("mlp_norm"), &name("mlp.norm"));
            let up = tensors.remove(&name("mlp.up_proj")).expect("up_proj");
            let both = Tensor::cat(&[&tensors[&name("mlp.gate_proj")], &up], 0)?;
            tensors.insert(name("mlp.gate_proj"), both);
        }
        Ok(())
    })?;
    golden_logits(&load(&folder)?, "delta_net")
}

/// Their `D` is in no sum.
#[test]
fn early_gated_delta_nets_load() -> Result<()> {
    let folder = changed("gated_deltanet", |tensors| {
        for layer in 0..2 {
            tensors.insert(format!("model.layers.{layer}.attn.D"), Tensor::ones(2, DType::F32, &CPU)?);
        }
        Ok(())
    })?;
    golden_logits(&load(&folder)?, "gated_deltanet")
}

#[test]
fn early_rwkv7_loads() -> Result<()> {
    let folder = changed("rwkv7", |tensors| {
        for layer in 0..3 {
            let name = |part: &str| format!("model.layers.{layer}.attn.x_{part}");
            let parts = ["r", "w", "k", "v", "a", "g"].map(|part| tensors.remove(&name(part)).expect("x_*"));
            tensors.insert(name("x"), Tensor::cat(&parts, 0)?.squeeze(1)?);
        }
        Ok(())
    })?;
    golden_logits(&load(&folder)?, "rwkv7")
}

#[test]
fn early_mamba2_loads() -> Result<()> {
    let folder = changed("mamba2", |tensors| {
        rename(tensors, "backbone.embeddings.weight", "backbone.embedding.weight");
        Ok(())
    })?;
    golden_logits(&load(&folder)?, "mamba2")
}

/// A file that stores shared tensors once may have kept the head.
#[test]
fn tied_embeddings_load_under_either_name() -> Result<()> {
    let folder = copy_of("gla-tied")?;
    let mut tensors = tensors(&folder)?;
    let shared = tensors.remove("model.embeddings.weight").expect("embeddings");
    tensors.insert("lm_head.weight".into(), shared);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    golden_logits(&load(&folder)?, "gla-tied")
}

#[test]
fn missing_files_are_named() -> Result<()> {
    assert_says(&message(Model::load("no/such/folder", None, &CPU)), &["no/such/folder", "not a folder"]);
    let folder = copy_of("gla")?;
    fs::remove_file(folder.path().join("model.safetensors"))?;
    assert_says(&message(load(&folder)), &["neither model.safetensors nor model.safetensors.index.json"]);
    fs::remove_file(folder.path().join("config.json"))?;
    assert_says(&message(load(&folder)), &["config.json: cannot be read"]);
    Ok(())
}

#[test]
fn truncated_and_corrupt_files_are_named() -> Result<()> {
    let folder = copy_of("retnet")?;
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path)?;
    let mut huge_header = whole.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut not_json = whole.clone();
    not_json[8] = b'x';
    let mut long = whole.clone();
    long.extend([0; 16]);
    let broken: [(&str, &[u8]); 8] = [
        ("empty", &[]),
        ("seven bytes", &whole[..7]),
        ("in the header", &whole[..100]),
        ("in the data", &whole[..whole.len() - 1]),
        ("header longer than the file", &huge_header),
        ("header not JSON", &not_json),
        ("data left over", &long),
        ("another format", b"PK\x03\x04 this is an archive of some other kind"),
    ];
    for (what, bytes) in broken {
        fs::write(&path, bytes)?;
        let message = message(load(&folder));
        assert_says(&message, &["model.safetensors: not a whole safetensors file"]);
        assert_eq!(message.matches("model.safetensors").count(), 1, "{what}: {message}");
    }
    Ok(())
}

#[test]
fn a_missing_tensor_is_named() -> Result<()> {
    for name in [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.attn.gk_proj.1.bias",
        "model.layers.0.mlp.up_proj.weight",
    ] {
        let folder = copy_of("gla")?;
        let mut tensors = tensors(&folder)?;
        tensors.remove(name).expect("a tensor");
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
        assert_says(&message(load(&folder)), &["model.safetensors", name, "missing"]);
    }
    Ok(())
}

#[test]
fn a_misshapen_tensor_is_named() -> Result<()> {
    let folder = copy_of("gla")?;
    let mut tensors = tensors(&folder)?;
    tensors.insert("model.layers.1.attn.k_proj.weight".into(), Tensor::zeros((16, 31), DType::F32, &CPU)?);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    let parts = ["model.safetensors", "model.layers.1.attn.k_proj.weight", "[16, 31]", "[16, 32]"];
    assert_says(&message(load(&folder)), &parts);
    Ok(())
}

#[test]
fn a_tensor_of_integers_is_refused() -> Result<()> {
    let folder = copy_of("gla")?;
    let mut tensors = tensors(&folder)?;
    tensors.insert("model.norm.weight".into(), Tensor::zeros(32, DType::I64, &CPU)?);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    assert_says(&message(load(&folder)), &["model.safetensors", "model.norm.weight", "I64", "must be F32"]);
    Ok(())
}

/// Eight bits need scales, which files have by other names.
#[test]
fn quantized_checkpoints_are_refused() -> Result<()> {
    let folder = copy_of("qwen3_5")?;
    let mut tensors = tensors(&folder)?;
    let narrow = tensors["lm_head.weight"].to_dtype(DType::F8E4M3)?;
    tensors.insert("lm_head.weight".into(), narrow);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    assert_says(&message(load(&folder)), &["model.safetensors", "lm_head.weight", "F8_E4M3", "must be F32"]);
    let path = folder.path().join("config.json");
    let config =
        fs::read_to_string(&path)?.replacen('{', r#"{"quantization_config": {"quant_method": "fp8"},"#, 1);
    fs::write(&path, config)?;
    assert_says(&message(load(&folder)), &["config.json", "`quantization_config`", "must be null"]);
    Ok(())
}

#[test]
fn loading_tells_how_far_it_is() -> Result<()> {
    use candle_linear_attn::models::{LoadOptions, Progress};
    use std::sync::{Arc, Mutex};
    for name in ["gla", "qwen3_5-multimodal"] {
        let folder = copy_of(name)?;
        shard(&folder)?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let report = seen.clone();
        let progress = Arc::new(move |progress: Progress| report.lock().unwrap().push(progress));
        let options = LoadOptions { progress: Some(progress), ..LoadOptions::default() };
        let model = Model::load_with(folder.path(), &CPU, options)?;
        golden_logits(&model, name)?;
        let seen = seen.lock().unwrap();
        let total: usize = tensors(&copy_of(name)?)?.values().map(|t| t.elem_count() * 4).sum();
        assert!(seen.iter().all(|progress| progress.total == total as u64));
        assert_eq!((seen[0].done, seen[seen.len() - 1].done), (0, total as u64), "{name}");
        assert!(seen.len() > 10 && seen.is_sorted_by_key(|progress| progress.done));
    }
    Ok(())
}

#[test]
fn broken_indices_are_named() -> Result<()> {
    let index_of = |folder: &Path| folder.join("model.safetensors.index.json");
    let folder = copy_of("gla")?;
    shard(&folder)?;
    let index = index_of(folder.path());
    let good = fs::read_to_string(&index)?;

    let second = folder.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&second)?;
    fs::write(&second, &bytes[..bytes.len() - 4])?;
    assert_says(&message(load(&folder)), &["model-00002-of-00002.safetensors: not a whole safetensors file"]);
    fs::remove_file(&second)?;
    assert_says(
        &message(load(&folder)),
        &["index.json", "model-00002-of-00002.safetensors", "not in the folder"],
    );
    fs::write(&second, bytes)?;

    // The index promises a tensor that its file does not have.
    let moved = good.replace(
        "\"model.norm.weight\":\"model-00002-of-00002.safetensors\"",
        "\"model.norm.weight\":\"model-00001-of-00002.safetensors\"",
    );
    assert_ne!(moved, good);
    fs::write(&index, moved)?;
    assert_says(
        &message(load(&folder)),
        &["model-00001-of-00002.safetensors", "model.norm.weight", "missing"],
    );

    fs::write(&index, "{")?;
    assert_says(&message(load(&folder)), &["index.json: not valid JSON"]);
    for text in ["[]", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": 3}"#] {
        fs::write(&index, text)?;
        assert_says(&message(load(&folder)), &["index.json", "weight_map"]);
    }
    for file in ["../secret.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b.safetensors"] {
        fs::write(&index, serde_json::json!({ "weight_map": { "lm_head.weight": file } }).to_string())?;
        assert_says(&message(load(&folder)), &["index.json", "lm_head.weight", "a file beside it"]);
    }
    Ok(())
}

#[test]
fn a_broken_config_is_named_with_its_file() -> Result<()> {
    let folder = copy_of("gla")?;
    let path = folder.path().join("config.json");
    for (text, parts) in [
        ("", ["config.json", "not valid JSON"]),
        ("[1]", ["config.json", "must be a JSON object"]),
        ("{}", ["config.json", "`model_type` is missing"]),
        (r#"{"model_type": 3}"#, ["config.json", "`model_type` is 3"]),
        (r#"{"model_type": "gla", "num_heads": "two"}"#, ["config.json", "`num_heads` is \"two\""]),
    ] {
        fs::write(&path, text)?;
        assert_says(&message(load(&folder)), &parts);
    }
    Ok(())
}

#[test]
fn wrong_inputs_to_a_model_are_named() -> Result<()> {
    let model = Model::load(golden_folder("gla"), None, &CPU)?;
    let ids = |ids: &[u32]| Tensor::new(ids, &CPU)?.unsqueeze(0);
    assert_says(&message(model.forward(&ids(&[1, 96])?, None)), &["token 96", "vocabulary size 96"]);
    let negative = Tensor::new(&[[-1i64]], &CPU)?;
    assert_says(&message(model.forward(&negative, None)), &["token -1"]);
    assert_says(&message(model.forward(&ids(&[])?, None)), &["input_ids", "[1, 0]", "[B, T]"]);
    assert_says(&message(model.forward(&ids(&[1])?.squeeze(0)?, None)), &["input_ids", "[1]", "[B, T]"]);
    let floats = Tensor::zeros((1, 2), DType::F32, &CPU)?;
    assert_says(&message(model.forward(&floats, None)), &["input_ids", "F32", "U32"]);
    assert_says(&message(model.logits(&floats)), &["hidden", "[1, 2]", "32"]);
    assert_says(&message(Model::load(golden_folder("gla"), Some(DType::F64), &CPU)), &["dtype is F64"]);

    let mut cache = model.new_cache();
    model.forward(&ids(&[1, 2])?, Some(&mut cache))?;
    let batch = Tensor::new(&[[1u32], [2]], &CPU)?;
    assert_says(&message(model.forward(&batch, Some(&mut cache))), &["batch size is 2", "1 sequences"]);
    assert_eq!(cache.tokens(), 2);
    let (other, _) = small_model(r#""model_type": "gla", "num_hidden_layers": 3"#)?;
    assert_says(&message(other.forward(&ids(&[1])?, Some(&mut cache))), &["cache", "2 layers", "3"]);
    Ok(())
}

#[test]
fn a_file_of_more_layers_than_the_configuration_has_is_refused() -> Result<()> {
    for (name, layers, beyond) in [
        ("gla", 1, "model.layers.1.attn.g_norm_swish_gate.weight"),
        ("mamba2", 1, "backbone.layers.1.mixer.A_log"),
        ("qwen3_5-multimodal", 3, "model.language_model.layers.3."),
    ] {
        let folder = copy_of(name)?;
        let path = folder.path().join("config.json");
        // mamba2's has an infinity of Python's.
        let text = fs::read_to_string(&path)?.replace("Infinity", "1e30");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let fields = if config["text_config"].is_object() { &mut config["text_config"] } else { &mut config };
        fields["num_hidden_layers"] = layers.into();
        fields["layer_types"] = serde_json::Value::Null;
        fs::write(path, config.to_string())?;
        let whole = [beyond, &format!("`num_hidden_layers` is {layers}")];
        assert_says(&message(load(&folder)), &whole);
        shard(&folder)?;
        assert_says(&message(load(&folder)), &whole);
    }
    Ok(())
}
