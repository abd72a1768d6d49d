//! What loading a checkpoint takes: its weights once. In a test binary of its own, because it measures the whole process.
#![cfg(target_os = "linux")]

use candle_core::{DType, Device, Result, Tensor};
use candle_linear_attn::models::{Config, Model};
use candle_nn::{VarBuilder, VarMap};
use std::path::Path;

const CONFIG: &str = r#"{"model_type": "qwen3_next", "hidden_size": 256, "vocab_size": 20000, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}"#;

/// A field of `/proc/self/status` in bytes.
fn status(field: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("a field");
    line.trim_matches([':', '\t', ' ', 'k', 'B']).parse::<usize>().expect("a number") * 1024
}

/// Writes the checkpoint in two files, and says how large they are.
fn write(folder: &Path, dtype: DType) -> Result<usize> {
    let varmap = VarMap::new();
    Model::new(&Config::from_json_str(CONFIG)?, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    let mut parts = [std::collections::HashMap::<String, Tensor>::new(), Default::default()];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, var)) in varmap.data().lock().unwrap().iter().enumerate() {
        parts[i % 2].insert(name.clone(), var.as_tensor().to_dtype(dtype)?);
        weight_map.insert(name.clone(), format!("{}.safetensors", i % 2).into());
    }
    for (i, part) in parts.iter().enumerate() {
        candle_core::safetensors::save(part, folder.join(format!("{i}.safetensors")))?;
    }
    let index = serde_json::json!({ "weight_map": weight_map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
    std::fs::write(folder.join("config.json"), CONFIG)?;
    let sizes =
        (0..2).map(|i| folder.join(format!("{i}.safetensors")).metadata().map(|file| file.len() as usize));
    Ok(sizes.sum::<std::io::Result<usize>>()?)
}

/// Where the process that is measured finds its checkpoint.
const FOLDER: &str = "CLA_TEST_CHECKPOINT";

#[test]
fn weights_are_in_memory_once() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let folder = tempfile::tempdir()?;
        let stored = write(folder.path(), dtype)?;
        // A process of its own: what writing has left in this one would be used again.
        let output = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", "loads_and_says_what_it_took", "--nocapture"])
            .env(FOLDER, folder.path())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let taken = text.lines().find_map(|line| line.strip_prefix("took ")).map(str::parse::<usize>);
        let Some(Ok(taken)) = taken else { panic!("{text}{}", String::from_utf8_lossy(&output.stderr)) };
        let times = taken as f64 / stored as f64;
        println!("{dtype:?}: {stored} bytes are stored, {times:.2} times as many were used");
        assert!((0.9..=1.15).contains(&times), "{dtype:?}: loading takes {times:.2} times what is stored");
    }
    Ok(())
}

/// The other half of the test above; by itself it has nothing to do.
#[test]
fn loads_and_says_what_it_took() -> Result<()> {
    let Ok(folder) = std::env::var(FOLDER) else { return Ok(()) };
    let before = status("VmRSS");
    let model = Model::load(folder, None, &Device::Cpu)?;
    println!("\ntook {}", status("VmHWM") - before);
    drop(model);
    Ok(())
}
