//! `config.json`: what is refused, what is filled in.

use crate::support::*;
use candle_core::Result;
use candle_linear_attn::models::{Config, SUPPORTED};
use std::fs;

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
    ];
    for (fields, parts) in cases {
        assert_says(&message(small_config(fields)), parts);
    }
}

#[test]
fn an_attention_list_without_layers_is_no_attention() -> Result<()> {
    small_config(r#""model_type": "gla", "attn": {"layers": [], "num_heads": 2}"#)?;
    small_config(r#""model_type": "gla", "attn": []"#)?;
    Ok(())
}

/// What is not in the file has the defaults of the original, and `to_json` writes all of it down.
#[test]
fn defaults_are_filled_in_and_written() -> Result<()> {
    for (model_type, architecture, heads, ratio) in [
        ("linear_attn", "LinearAttentionForCausalLM", 4, 4),
        ("gla", "GLAForCausalLM", 4, 4),
        ("retnet", "RetNetForCausalLM", 8, 2),
    ] {
        let config = Config::from_json_str(&format!(r#"{{"model_type": "{model_type}", "made_by": "me"}}"#))?;
        assert_eq!((config.vocab_size(), config.hidden_size(), config.num_layers()), (32000, 2048, 24));
        assert_eq!((config.bos_token_id(), config.eos_token_ids()), (Some(1), vec![2]));
        let written: serde_json::Value = serde_json::from_str(&config.to_json()).expect("JSON");
        assert_eq!(written["architectures"], serde_json::json!([architecture]));
        assert_eq!((&written["num_heads"], &written["hidden_ratio"]), (&heads.into(), &ratio.into()));
        assert_eq!(written["made_by"], "me");
        let golden: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(golden_folder(model_type).join("config.json"))?)
                .expect("JSON");
        assert_eq!(written["attn_mode"], golden["attn_mode"]);
        assert_eq!(Config::from_json_str(&config.to_json())?.to_json(), config.to_json());
    }
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
