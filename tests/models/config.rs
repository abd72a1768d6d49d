//! `config.json`: what is refused, what is filled in.

use crate::support::*;
use candle_core::Result;
use candle_linear_attn::models::{Config, SUPPORTED};
use serde_json::json;

#[test]
fn an_unknown_model_type_lists_the_known() {
    let message = message(Config::from_json_str(r#"{"model_type": "bert"}"#));
    assert_says(&message, &["\"bert\"", "not supported"]);
    assert_says(&message, SUPPORTED);
}

#[test]
fn fields_that_make_no_model_are_named() {
    let cases: &[(&str, &[&str])] = &[
        (r#""model_type": "gla", "num_heads": 0"#, &["`num_heads` is 0"]),
        (r#""model_type": "gla", "num_heads": -1"#, &["`num_heads` is -1"]),
        (r#""model_type": "gla", "num_heads": 2.5"#, &["`num_heads` is 2.5"]),
        (r#""model_type": "gla", "num_heads": null"#, &["`num_heads` is null"]),
        (r#""model_type": "gla", "num_heads": 3"#, &["num_heads is 3", "must divide"]),
        (r#""model_type": "gla", "num_kv_heads": 3"#, &["num_kv_heads is 3", "must divide"]),
        (r#""model_type": "gla", "hidden_size": 99999999999"#, &["`hidden_size` is 99999999999"]),
        (r#""model_type": "gla", "num_hidden_layers": 1e30"#, &["`num_hidden_layers` is 1e+30"]),
        (r#""model_type": "gla", "num_hidden_layers": 0"#, &["`num_hidden_layers` is 0", "from 1 to 16384"]),
        (r#""model_type": "gla", "num_hidden_layers": 16385"#, &["is 16385", "from 1 to 16384"]),
        (r#""model_type": "gla", "hidden_ratio": 1e30, "intermediate_size": null"#, &["`hidden_ratio`"]),
        (r#""model_type": "gla", "hidden_ratio": 0"#, &["`hidden_ratio` is 0"]),
        (r#""model_type": "gla", "expand_k": 0"#, &["`expand_k` is 0"]),
        (r#""model_type": "gla", "expand_k": 0.3"#, &["expand_k is 0.3", "whole number"]),
        (r#""model_type": "gla", "expand_v": 1e300"#, &["expand_v is", "whole number"]),
        (r#""model_type": "gla", "norm_eps": 0"#, &["`norm_eps` is 0"]),
        (r#""model_type": "gla", "conv_size": 0"#, &["`conv_size` is 0"]),
        (
            r#""model_type": "gla", "use_short_conv": "yes""#,
            &["`use_short_conv` is \"yes\"", "true or false"],
        ),
        (r#""model_type": "gla", "clamp_min": "low""#, &["`clamp_min` is \"low\""]),
        (
            r#""model_type": "gla", "feature_map": "softmax""#,
            &["`feature_map` is \"softmax\"", "relu", "sqrelu"],
        ),
        (r#""model_type": "gla", "hidden_act": "gelu""#, &["`hidden_act` is \"gelu\"", "swish"]),
        (r#""model_type": "gla", "hidden_act": "powlu""#, &["`hidden_act` is \"powlu\"", "swish"]),
        (r#""model_type": "gla", "attn_mode": "magic""#, &["`attn_mode` is \"magic\"", "fused_chunk"]),
        (r#""model_type": "gla", "attnres_block_size": 2"#, &["`attnres_block_size` is 2", "must be null"]),
        (r#""model_type": "gla", "attn": {"layers": [1], "num_heads": 2}"#, &["`attn`", "softmax attention"]),
        (
            r#""model_type": "gla", "attn": [{"layers": [0], "num_heads": 2}]"#,
            &["`attn`", "softmax attention"],
        ),
        (r#""model_type": "gla", "eos_token_id": "end""#, &["`eos_token_id` is \"end\""]),
        (r#""model_type": "gla", "bos_token_id": -7"#, &["`bos_token_id` is -7"]),
        (
            r#""model_type": "linear_attn", "feature_map": "rebased""#,
            &["`feature_map` is \"rebased\"", "hedgehog"],
        ),
        (r#""model_type": "linear_attn", "feature_map": null"#, &["`feature_map` is null"]),
        (r#""model_type": "linear_attn", "norm_q": 1"#, &["`norm_q` is 1", "true or false"]),
        (
            r#""model_type": "retnet", "feature_map": "elementwise_product""#,
            &["`feature_map` is", "quick_gelu"],
        ),
        (r#""model_type": "retnet", "hidden_size": 6"#, &["3 key channels", "even"]),
        (r#""model_type": "hgrn2", "expand_ratio": 17"#, &["expand_ratio is 17", "16"]),
        (r#""model_type": "hgrn2", "expand_ratio": 5"#, &["expand_ratio is 5", "3 heads"]),
        (r#""model_type": "hgrn2", "expand_ratio": 7"#, &["`expand_ratio` is 7", "`use_lower_bound`"]),
        (
            r#""model_type": "hgrn2", "expand_ratio": null, "num_heads": null"#,
            &["`expand_ratio`", "`num_heads`"],
        ),
        (r#""model_type": "mamba2", "head_dim": 8"#, &["`num_heads` is 2", "which is 4"]),
        (r#""model_type": "mamba2", "head_dim": 9"#, &["head_dim is 9", "32"]),
        (r#""model_type": "mamba2", "head_dim": 16, "n_groups": 3"#, &["n_groups is 3"]),
        (r#""model_type": "mamba2", "head_dim": 16, "dt_limit": [1]"#, &["`dt_limit` is [1]", "two numbers"]),
        (r#""model_type": "mamba2", "head_dim": 16, "dt_limit": [2, 1]"#, &["dt_limit is [2, 1]"]),
        (r#""model_type": "mamba2", "head_dim": 16, "dt_max": 1e-4"#, &["dt_min and dt_max"]),
        (r#""model_type": "mamba2", "head_dim": 16, "hidden_act": "tanh"#, &["not valid JSON"]),
        (r#""model_type": "mamba2", "head_dim": 16, "hidden_act": "tanh""#, &["`hidden_act` is \"tanh\""]),
        (r#""model_type": "delta_net", "qk_norm": "l1""#, &["`qk_norm` is \"l1\"", "l2, sum"]),
        (
            r#""model_type": "delta_net", "qk_activation": "gelu""#,
            &["`qk_activation` is \"gelu\"", "identity"],
        ),
        (r#""model_type": "delta_net", "num_heads": 5"#, &["num_heads is 5", "must divide"]),
        (r#""model_type": "gated_deltanet", "num_v_heads": 3"#, &["num_v_heads is 3", "num_heads"]),
        (
            r#""model_type": "gated_deltanet", "output_gate_activation": "relu""#,
            &["`output_gate_activation` is \"relu\"", "sigmoid"],
        ),
        (
            r#""model_type": "gla", "use_short_conv": true, "share_conv_kernel": true"#,
            &["`share_conv_kernel` is true", "one convolution"],
        ),
        (r#""model_type": "delta_net", "share_conv_kernel": true"#, &["`share_conv_kernel` is true"]),
        (r#""model_type": "gated_deltanet", "use_residual": true"#, &["`use_residual` is true", "skip"]),
        (r#""model_type": "gated_deltanet", "use_mamba_gate": false"#, &["`use_mamba_gate` is false"]),
        (r#""model_type": "kda", "safe_gate": true"#, &["`lower_bound` is null", "`safe_gate`"]),
        (r#""model_type": "kda", "safe_gate": true, "lower_bound": -6"#, &["`lower_bound` is -6"]),
        (r#""model_type": "kda", "lower_bound": 1"#, &["lower_bound is 1", "below 0"]),
        (r#""model_type": "rwkv7", "head_dim": 5"#, &["head_dim is 5", "hidden_size"]),
        (r#""model_type": "rwkv7", "head_dim": null, "num_heads": null"#, &["`head_dim`", "`num_heads`"]),
        (r#""model_type": "rwkv7", "head_dim": null, "num_heads": 3"#, &["`num_heads` is 3"]),
        (r#""model_type": "rwkv7", "head_dim": 8, "value_dim": 24"#, &["`value_dim` is 24"]),
        (r#""model_type": "rwkv7", "head_dim": 8, "value_dim": [16]"#, &["`value_dim` is [16]", "2 of them"]),
        (
            r#""model_type": "rwkv7", "head_dim": 8, "value_dim": [16, 32]"#,
            &["`value_dim` is [16,32]", "share"],
        ),
        (
            r#""model_type": "rwkv7", "head_dim": 8, "attn": {"layers": [1]}"#,
            &["`attn`", "softmax attention"],
        ),
        (r#""model_type": "kda", "attnres_block_size": 2"#, &["`attnres_block_size` is 2", "must be null"]),
    ];
    for (fields, parts) in cases {
        assert_says(&message(small_config(fields)), parts);
    }
}

#[test]
fn an_attention_list_without_layers_is_no_attention() -> Result<()> {
    small_config(r#""model_type": "gla", "attn": {"layers": [], "num_heads": 2}"#)?;
    small_config(r#""model_type": "gla", "attn": []"#)?;
    // What was written into every file of its time.
    small_config(r#""model_type": "gla", "use_short_conv": false, "share_conv_kernel": true"#)?;
    small_config(r#""model_type": "gated_deltanet", "use_mamba_gate": true, "use_residual": false"#)?;
    Ok(())
}

/// What is not in the file has the defaults of the original, and `to_json` writes all of it down.
#[test]
fn defaults_are_filled_in_and_written() -> Result<()> {
    for (model_type, architecture, heads, ratio, layers) in [
        ("linear_attn", "LinearAttentionForCausalLM", json!(4), json!(4), 24),
        ("gla", "GLAForCausalLM", json!(4), json!(4), 24),
        ("retnet", "RetNetForCausalLM", json!(8), json!(2), 24),
        ("hgrn2", "HGRN2ForCausalLM", json!(null), json!(4), 24),
        ("mamba2", "Mamba2ForCausalLM", json!(64), json!(null), 48),
        ("delta_net", "DeltaNetForCausalLM", json!(16), json!(4), 24),
        ("gated_deltanet", "GatedDeltaNetForCausalLM", json!(6), json!(4), 21),
        ("kda", "KDAForCausalLM", json!(16), json!(4), 24),
        ("rwkv7", "RWKV7ForCausalLM", json!(null), json!(4), 24),
    ] {
        let config = Config::from_json_str(&format!(r#"{{"model_type": "{model_type}", "made_by": "me"}}"#))?;
        assert_eq!((config.vocab_size(), config.hidden_size(), config.num_layers()), (32000, 2048, layers));
        assert_eq!((config.bos_token_id(), config.eos_token_ids()), (Some(1), vec![2]));
        let written: serde_json::Value = serde_json::from_str(&config.to_json()).expect("JSON");
        assert_eq!(written["architectures"], serde_json::json!([architecture]));
        assert_eq!((&written["num_heads"], &written["hidden_ratio"]), (&heads, &ratio));
        assert_eq!(written["made_by"], "me");
        assert_eq!(config.unread_fields(), ["made_by"]);
        if let Some(mode) = written.get("attn_mode") {
            let default = if model_type == "linear_attn" { "fused_chunk" } else { "chunk" };
            assert_eq!(mode, default, "{model_type}");
        }
        assert_eq!(Config::from_json_str(&config.to_json())?.to_json(), config.to_json());
    }
    Ok(())
}

/// Python writes words that JSON does not have, and both of its spellings may be met.
#[test]
fn infinities_are_read_however_they_are_written() -> Result<()> {
    let limit = |text: &str| {
        let fields = small_heads("mamba2");
        small_config(&format!(r#"{fields}, "note": "not \"Infinity\" \\", "dt_limit": {text}"#))
    };
    for text in
        ["[0.0, Infinity]", r#"[0.0, {"__float__": "Infinity"}]"#, "[-Infinity, Infinity]", "[0.1, NaN]"]
    {
        let config = limit(text);
        if text.contains("-I") || text.contains("NaN") {
            assert_says(&message(config), &["dt_limit"]);
            continue;
        }
        let config = config?;
        let written: serde_json::Value = serde_json::from_str(&config.to_json()).expect("JSON");
        assert_eq!(written["dt_limit"][1]["__float__"], "Infinity");
        assert_eq!(written["note"], r#"not "Infinity" \"#);
        assert_eq!(Config::from_json_str(&config.to_json())?.to_json(), config.to_json());
    }
    assert_says(&message(limit("[0.0, Infinite]")), &["not valid JSON"]);
    assert_says(&message(limit(r#"[0.0, "Infinity]"#)), &["not valid JSON"]);
    Ok(())
}

#[test]
fn end_tokens_may_be_several_or_none() -> Result<()> {
    let ends = |text: &str| {
        small_config(&format!(r#""model_type": "gla", "eos_token_id": {text}"#)).map(|c| c.eos_token_ids())
    };
    assert_eq!(ends("7")?, [7]);
    assert_eq!(ends("[7, 9]")?, [7, 9]);
    assert_eq!(ends("null")?, [0u32; 0]);
    assert_eq!(ends("-1")?, [0u32; 0]);
    Ok(())
}
