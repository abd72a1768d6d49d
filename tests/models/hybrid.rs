//! What softmax attention and experts bring with them: caches that grow, fields of their own, several forms of files.

use crate::support::*;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::models::{Config, Model};
use candle_linear_attn::nn::{LayerCache, RotaryConfig, RotaryEmbedding, RotaryScaling};
use std::collections::HashMap;

const HYBRIDS: [&str; 5] = ["qwen3_5", "qwen3_next", "minimax", "olmo_hybrid", "kimi_linear"];

#[test]
fn clones_of_a_cache_go_their_own_ways() -> Result<()> {
    for name in HYBRIDS {
        let model = Model::load(golden_folder(name), None, &CPU)?;
        let ids = pseudo_tokens(1, 30, 96)?;
        let other = Tensor::new(&[[90u32, 3, 7, 2]], &CPU)?;
        let mut first = model.new_cache();
        model.forward(&ids.narrow(1, 0, 20)?, Some(&mut first))?;
        let mut second = first.clone();
        let a = model.forward(&ids.narrow(1, 20, 4)?, Some(&mut first))?;
        let b = model.forward(&other, Some(&mut second))?;
        let c = model.forward(&ids.narrow(1, 24, 6)?, Some(&mut first))?;
        let whole = model.forward(&ids, None)?;
        assert_close(name, &Tensor::cat(&[a, c], 1)?, &whole.narrow(1, 20, 10)?, 1e-5)?;
        let diverged = Tensor::cat(&[&ids.narrow(1, 0, 20)?, &other], 1)?;
        assert_close(name, &b, &model.forward(&diverged, None)?.narrow(1, 20, 4)?, 1e-5)?;
        assert_eq!((first.tokens(), second.tokens()), (30, 24));
    }
    Ok(())
}

/// Its layer of softmax attention has written its tokens when the next one fails.
#[test]
fn a_call_that_fails_leaves_the_cache_as_it_was() -> Result<()> {
    let layers = r#", "layer_types": ["full_attention", "linear_attention"]"#;
    let fields = format!("{}{layers}", small_heads("qwen3_5_text"));
    let (model, _) = small_model(&fields)?;
    let (other, _) = small_model(&format!(r#"{fields}, "linear_key_head_dim": 5"#))?;
    let ids = pseudo_tokens(1, 12, 11)?;
    let mut cache = model.new_cache();
    let first = model.forward(&ids.narrow(1, 0, 7)?, Some(&mut cache))?;
    let size = cache.bytes();
    assert!(other.forward(&Tensor::new(&[[9u32, 9, 9]], &CPU)?, Some(&mut cache)).is_err());
    assert_eq!((cache.tokens(), cache.bytes()), (7, size));
    let rest = model.forward(&ids.narrow(1, 7, 5)?, Some(&mut cache))?;
    assert_close("after", &Tensor::cat(&[first, rest], 1)?, &model.forward(&ids, None)?, 1e-5)
}

#[test]
fn caches_of_the_other_kind_of_attention_are_refused() -> Result<()> {
    let model = |types: &str| {
        small_model(&format!(
            r#"{}, "num_hidden_layers": 1, "layer_types": ["{types}"]"#,
            small_heads("minimax")
        ))
    };
    let (full, linear) = (model("full_attention")?.0, model("linear_attention")?.0);
    let ids = pseudo_tokens(1, 3, 11)?;
    let mut cache = full.new_cache();
    full.forward(&ids, Some(&mut cache))?;
    assert_says(&message(linear.forward(&ids, Some(&mut cache))), &["cache", "softmax attention"]);
    let mut cache = linear.new_cache();
    linear.forward(&ids, Some(&mut cache))?;
    assert_says(&message(full.forward(&ids, Some(&mut cache))), &["cache", "softmax attention"]);
    Ok(())
}

/// A slot that is given back gives its keys and values back.
#[test]
fn a_pool_holds_the_keys_of_its_sequences_alone() -> Result<()> {
    let model = Model::load(golden_folder("qwen3_5"), None, &CPU)?;
    let mut pool = model.new_pool(2);
    let mut sizes = vec![];
    for (slot, tokens) in [(0, 200), (1, 10)] {
        let mut cache = model.new_cache();
        model.forward(&pseudo_tokens(1, tokens, 96)?, Some(&mut cache))?;
        pool.store(&[slot], &cache)?;
        sizes.push(pool.bytes());
    }
    assert!(sizes[1] > sizes[0]);
    pool.release(0)?;
    // Two heads of 32 keys and 32 values, f32.
    assert!(pool.bytes() + 200 * 2 * (32 + 32) * 4 <= sizes[1]);
    assert_eq!(pool.load(&[1])?.positions(), [10]);
    Ok(())
}

/// As transformers has them in memory, and as the files of later models do.
#[test]
fn experts_in_one_tensor_load() -> Result<()> {
    for (name, part, [gate, up, down]) in [
        ("qwen3_next", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("minimax", "block_sparse_moe", ["w1", "w3", "w2"]),
    ] {
        rewritten(name, |tensors| {
            for layer in 0..4 {
                let prefix = format!("model.layers.{layer}.{part}.experts");
                let mut stack = |of: &str| {
                    let take = |i| tensors.remove(&format!("{prefix}.{i}.{of}.weight")).expect("an expert");
                    Tensor::stack(&(0..4).map(take).collect::<Vec<_>>(), 0)
                };
                let (gate, up, down) = (stack(gate)?, stack(up)?, stack(down)?);
                tensors.insert(format!("{prefix}.gate_up_proj"), Tensor::cat(&[gate, up], 1)?);
                tensors.insert(format!("{prefix}.down_proj"), down);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn other_names_of_the_same_tensors_load() -> Result<()> {
    let rename = |from: &'static str, to: &'static str| {
        move |tensors: &mut HashMap<String, Tensor>| {
            let renamed = tensors.drain().map(|(name, tensor)| (name.replace(from, to), tensor)).collect();
            *tensors = renamed;
            Ok(())
        }
    };
    rewritten("kimi_linear", rename("block_sparse_moe", "mlp"))?;
    rewritten("kimi_linear", rename("layers.0.block_sparse_moe", "layers.0.mlp"))?;
    rewritten("minimax", rename("block_sparse_moe", "mlp"))?;
    rewritten("olmo_hybrid", rename("attention_layer_norm", "input_layernorm"))?;
    rewritten("olmo_hybrid", rename("feedforward_layer_norm", "post_attention_layernorm"))?;
    // The text part's configuration beside the files of the whole.
    rewritten("qwen3_5", rename("model.", "model.language_model."))?;
    rewritten("qwen3_5-multimodal", rename("model.language_model.", "model."))?;
    // The head that predicts further tokens.
    rewritten("qwen3_5", |tensors| {
        for name in ["mtp.fc.weight", "mtp.layers.9.input_layernorm.weight"] {
            tensors.insert(name.into(), Tensor::zeros((3, 3), DType::F32, &CPU)?);
        }
        Ok(())
    })
}

/// The golden logits from a file that has been changed.
fn rewritten(name: &str, change: impl Fn(&mut HashMap<String, Tensor>) -> Result<()>) -> Result<()> {
    let (source, folder) = (golden_folder(name), tempfile::tempdir()?);
    std::fs::copy(source.join("config.json"), folder.path().join("config.json"))?;
    let mut tensors = candle_core::safetensors::load(source.join("model.safetensors"), &CPU)?;
    change(&mut tensors)?;
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    let golden = candle_core::safetensors::load(source.join("golden.safetensors"), &CPU)?;
    let logits = Model::load(folder.path(), None, &CPU)?.forward(&golden["input_ids"], None)?;
    assert_close(name, &logits, &golden["logits"], 1e-4)
}

#[test]
fn fields_that_make_no_model_are_named() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("qwen3_5_text", r#""layer_types": ["full_attention"]"#, &["`layer_types` has 1", "must have 2"]),
        (
            "qwen3_5_text",
            r#""layer_types": ["full_attention", "sliding_attention"]"#,
            &["`layer_types`", "sliding_attention", "linear_attention"],
        ),
        ("qwen3_5_text", r#""layer_types": "all""#, &["`layer_types`", "list"]),
        (
            "qwen3_5_text",
            r#""num_key_value_heads": 3"#,
            &["`num_key_value_heads` is 3", "must divide num_attention_heads"],
        ),
        (
            "qwen3_5_text",
            r#""linear_num_value_heads": 3"#,
            &["`linear_num_value_heads` is 3", "linear_num_key_heads"],
        ),
        ("qwen3_5_text", r#""linear_conv_kernel_dim": 2000"#, &["`linear_conv_kernel_dim` is 2000"]),
        ("qwen3_5_text", r#""use_sliding_window": true"#, &["`use_sliding_window` is true"]),
        ("qwen3_5_text", r#""attn_output_gate": false"#, &["`attn_output_gate` is false"]),
        ("qwen3_5_text", r#""hidden_act": "swoosh""#, &["`hidden_act` is \"swoosh\""]),
        ("qwen3_5_text", r#""num_hidden_layers": 1000000000000"#, &["`num_hidden_layers`"]),
        ("qwen3_5_text", r#""num_hidden_layers": 60000000, "layer_types": null"#, &["`num_hidden_layers`"]),
        ("qwen3_5_text", r#""vocab_size": 1000000000000000000"#, &["`vocab_size`"]),
        ("qwen3_5_text", r#""head_dim": 60000000"#, &["`num_attention_heads` is 4", "too wide"]),
        (
            "qwen3_5_text",
            r#""rope_parameters": {"rope_type": "dynamic"}"#,
            &["`rope_parameters`", "dynamic", "yarn"],
        ),
        ("qwen3_5_text", r#""rope_scaling": {"type": "longrope"}"#, &["`rope_parameters`", "longrope"]),
        ("qwen3_5_text", r#""rope_parameters": {"rope_type": "linear"}"#, &["`factor` is missing"]),
        ("qwen3_5_text", r#""rope_parameters": {"rope_type": "linear", "factor": -1}"#, &["`factor` is -1"]),
        ("qwen3_5_text", r#""rope_parameters": {"rope_theta": 0}"#, &["`rope_theta` is 0"]),
        (
            "qwen3_5_text",
            r#""rope_parameters": {"partial_rotary_factor": 0.1}"#,
            &["`partial_rotary_factor`"],
        ),
        ("qwen3_5_text", r#""partial_rotary_factor": 2"#, &["`partial_rotary_factor` is 2"]),
        ("qwen3_5_text", r#""rope_parameters": 7"#, &["`rope_parameters` is 7", "object"]),
        (
            "qwen3_5_text",
            r#""rope_parameters": {"rope_type": "yarn", "factor": 4}"#,
            &["`original_max_position"],
        ),
        ("qwen3_next", r#""num_experts_per_tok": 4"#, &["`num_experts_per_tok` is 4", "which is 3"]),
        ("qwen3_next", r#""num_experts": 1000000000"#, &["`num_experts` is 1000000000"]),
        ("qwen3_next", r#""num_experts": null"#, &["`num_experts` is null"]),
        ("qwen3_next", r#""mlp_only_layers": 3"#, &["`mlp_only_layers` is 3"]),
        ("qwen3_next", r#""mlp_only_layers": ["a"]"#, &["`mlp_only_layers`"]),
        ("qwen3_next", r#""decoder_sparse_step": 0"#, &["`decoder_sparse_step` is 0"]),
        ("minimax", r#""sliding_window": 4096"#, &["`sliding_window` is 4096", "must be null"]),
        ("minimax", r#""num_experts_per_tok": 9"#, &["`num_experts_per_tok` is 9", "num_local_experts"]),
        ("minimax", r#""mlp_beta_factor": "one""#, &["`mlp_beta_factor`"]),
        ("minimax", r#""num_attention_heads": 17, "head_dim": null"#, &["`num_attention_heads` is 17"]),
        (
            "olmo_hybrid",
            r#""linear_num_value_heads": 3"#,
            &["`linear_num_value_heads` is 3", "linear_num_key_heads"],
        ),
        ("olmo_hybrid", r#""num_key_value_heads": 3"#, &["`num_key_value_heads` is 3"]),
        ("minimax", r#""num_key_value_heads": 3"#, &["`num_key_value_heads` is 3"]),
        ("olmo_hybrid", r#""linear_key_head_dim": 0"#, &["`linear_key_head_dim` is 0"]),
        ("kimi_linear", r#""mla_use_nope": false"#, &["`mla_use_nope` is false"]),
        ("kimi_linear", r#""num_key_value_heads": 1"#, &["`num_key_value_heads` is 1"]),
        (
            "kimi_linear",
            r#""moe_router_activation_func": "relu""#,
            &["`moe_router_activation_func` is \"relu\""],
        ),
        ("kimi_linear", r#""num_expert_group": 2"#, &["`num_expert_group` is 2", "num_experts, which"]),
        ("kimi_linear", r#""topk_group": 2"#, &["`topk_group` is 2", "num_expert_group"]),
        ("kimi_linear", r#""num_experts_per_token": 4"#, &["`num_experts_per_token` is 4"]),
        (
            "kimi_linear",
            r#""num_experts_per_token": null, "num_experts_per_tok": 4, "num_experts": null, "n_routed_experts": 3"#,
            &["`num_experts_per_tok` is 4"],
        ),
        ("kimi_linear", r#""linear_conv_kernel_dim": 2000"#, &["`linear_conv_kernel_dim` is 2000"]),
        ("kimi_linear", r#""linear_attn_config": {"num_heads": 60000000}"#, &["`num_heads` is 60000000"]),
        ("kimi_linear", r#""hidden_act": "gelu""#, &["`hidden_act` is \"gelu\""]),
        ("kimi_linear", r#""mlp_layer_types": ["dense"]"#, &["`mlp_layer_types`", "2 of dense, sparse"]),
        (
            "kimi_linear",
            r#""layer_types": null, "linear_attn_config": {"full_attn_layers": [1], "kda_layers": []}"#,
            &["`linear_attn_config`", "layer 2"],
        ),
        (
            "kimi_linear",
            r#""layer_types": null, "linear_attn_config": {"full_attn_layers": [0, 1], "kda_layers": [2]}"#,
            &["full_attn_layers", "from 1 to 2"],
        ),
        (
            "kimi_linear",
            r#""linear_attn_config": {"head_dim": -3}"#,
            &["`linear_attn_config`", "`head_dim` is -3"],
        ),
    ];
    for (model_type, fields, parts) in cases {
        assert_says(&message(small_config(&format!("{}, {fields}", small_heads(model_type)))), parts);
    }
    for (config, parts) in [
        (r#"{"model_type": "qwen3_5"}"#, ["`text_config` is missing", "object"]),
        (r#"{"model_type": "qwen3_5", "text_config": 3}"#, ["`text_config` is 3", "object"]),
        (
            r#"{"model_type": "qwen3_5", "text_config": {"head_dim": 0}}"#,
            ["`text_config`", "`head_dim` is 0"],
        ),
    ] {
        assert_says(&message(Config::from_json_str(config)), &parts);
    }
}

/// A configuration may ask for more than a file has: the first tensor that is too small is named, nothing is allocated.
#[test]
fn sizes_beyond_the_file_are_refused_at_once() -> Result<()> {
    for (name, from, to, part) in [
        ("qwen3_next", r#""num_experts": 4"#, r#""num_experts": 60000000"#, "mlp.gate.weight"),
        ("minimax", r#""num_local_experts": 4"#, r#""num_local_experts": 60000000"#, "gate.weight"),
        ("kimi_linear", r#""vocab_size": 96"#, r#""vocab_size": 60000000"#, "embed_tokens.weight"),
        ("qwen3_5", r#""hidden_size": 32"#, r#""hidden_size": 60000000"#, "embed_tokens.weight"),
    ] {
        let (source, folder) = (golden_folder(name), tempfile::tempdir()?);
        let config = std::fs::read_to_string(source.join("config.json"))?;
        assert!(config.contains(from), "{name}");
        std::fs::write(folder.path().join("config.json"), config.replace(from, to))?;
        std::fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors"))?;
        assert_says(
            &message(Model::load(folder.path(), None, &CPU)),
            &["model.safetensors", part, "60000000"],
        );
    }
    Ok(())
}

#[test]
fn defaults_are_those_of_transformers() -> Result<()> {
    for (model_type, vocab, hidden, layers, eos) in [
        ("qwen3_5_text", 248320, 4096, 32, vec![]),
        ("qwen3_next", 151936, 2048, 48, vec![]),
        ("minimax", 32000, 4096, 32, vec![2]),
        ("olmo_hybrid", 100352, 3840, 32, vec![100257]),
        ("kimi_linear", 163840, 2304, 27, vec![163586]),
    ] {
        let config = Config::from_json_str(&format!(r#"{{"model_type": "{model_type}"}}"#))?;
        let found = (config.vocab_size(), config.hidden_size(), config.num_layers());
        assert_eq!((found, config.eos_token_ids()), ((vocab, hidden, layers), eos), "{model_type}");
        assert_eq!(Config::from_json_str(&config.to_json())?.to_json(), config.to_json(), "{model_type}");
    }
    let multimodal = golden_folder("qwen3_5-multimodal").join("config.json");
    assert_eq!(Config::from_file(multimodal)?.eos_token_ids(), [2]);
    Ok(())
}

const LLAMA3: [f64; 8] =
    [1.0, 0.316227766, 0.1, 0.0316227766, 0.0078401886, 0.0004236393, 0.000125, 3.95285e-05];
const YARN: [f64; 8] = [1.0, 0.316227766, 0.1, 0.025693506, 0.00625, 0.0013834965, 0.00025, 7.90569e-05];

/// Frequencies that were computed once by the formulas of transformers.
#[test]
fn stretched_frequencies_are_those_of_transformers() -> Result<()> {
    let llama3 =
        RotaryScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_len: 2048. };
    let yarn = RotaryScaling::Yarn {
        factor: 4.,
        beta_fast: 32.,
        beta_slow: 1.,
        original_len: 2048.,
        attention_factor: 0.1 * 4f64.ln() + 1.,
        truncate: true,
    };
    for (scaling, expected, factor) in [(llama3, LLAMA3, 1.), (yarn, YARN, 1.138_629_436_111_989)] {
        let config = RotaryConfig { head_dim: 16, rotary_dim: 16, base: 1e4, scaling };
        let rotary = RotaryEmbedding::from_config(&config)?;
        // Token 1 of ones in the first half and zeros in the second: the cosines, then the sines.
        let ones =
            Tensor::cat(&[Tensor::ones(8, DType::F32, &CPU)?, Tensor::zeros(8, DType::F32, &CPU)?], 0)?;
        let turned = rotary.forward(&ones.reshape((1, 1, 1, 16))?, 1)?.flatten_all()?.to_vec1::<f32>()?;
        for (i, frequency) in expected.iter().enumerate() {
            assert!((f64::from(turned[i]) - factor * frequency.cos()).abs() < 1e-6, "{scaling:?} {i}");
            assert!((f64::from(turned[8 + i]) - factor * frequency.sin()).abs() < 1e-6, "{scaling:?} {i}");
        }
    }
    Ok(())
}

/// Keys and values of a layer by itself, packed and in pieces.
#[test]
fn attention_by_itself_takes_packed_sequences() -> Result<()> {
    use candle_linear_attn::nn::{Attention, AttentionConfig};
    let varmap = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&varmap, DType::F32, &CPU);
    let config =
        AttentionConfig { hidden_size: 8, num_heads: 4, num_kv_heads: 2, head_dim: 6, ..Default::default() };
    let layer = Attention::new(&config, vb)?;
    let xs = pseudo_random(&[1, 12, 8], 3)?;
    let mut cache = LayerCache::new();
    let whole = layer.forward_packed(&xs, &[0, 5, 5, 12], None)?;
    let first = layer.forward_packed(&xs.narrow(1, 0, 5)?, &[0, 5, 5, 5], Some(&mut cache))?;
    let second = layer.forward_packed(&xs.narrow(1, 5, 7)?, &[0, 0, 0, 7], Some(&mut cache))?;
    assert_eq!(cache.positions(), [5, 0, 7]);
    assert_close("packed", &Tensor::cat(&[first, second], 1)?, &whole, 1e-6)
}
