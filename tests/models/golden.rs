//! The checkpoints of the original implementation give the logits it computed.

use crate::support::*;
use candle_core::{D, DType, Result, Tensor};
use candle_linear_attn::Mode;
use candle_linear_attn::models::Model;
use std::collections::HashMap;

const LIMIT: f64 = 1e-4;
const MODES: [Mode; 4] = [Mode::Auto, Mode::Recurrent, Mode::Chunk, Mode::FusedChunk];

fn open(name: &str, dtype: Option<DType>) -> Result<(Model, Tensor, HashMap<String, Tensor>)> {
    let folder = golden_folder(name);
    let golden = candle_core::safetensors::load(folder.join("golden.safetensors"), &CPU)?;
    let input_ids = golden["input_ids"].to_dtype(DType::U32)?;
    Ok((Model::load(folder, dtype, &CPU)?, input_ids, golden))
}

/// The first `prompt` tokens in one piece, the others one at a time.
fn stepwise(model: &Model, input_ids: &Tensor, prompt: usize) -> Result<Tensor> {
    let mut cache = model.new_cache();
    let tokens = input_ids.dim(1)?;
    let mut logits = Vec::new();
    if prompt > 0 {
        logits.push(model.forward(&input_ids.narrow(1, 0, prompt)?, Some(&mut cache))?);
    }
    for t in prompt..tokens {
        logits.push(model.forward(&input_ids.narrow(1, t, 1)?, Some(&mut cache))?);
    }
    assert_eq!(cache.tokens(), tokens);
    Tensor::cat(&logits, 1)
}

#[test]
fn whole_sequence_in_every_mode() -> Result<()> {
    for name in GOLDEN {
        let (mut model, input_ids, golden) = open(name, None)?;
        for mode in MODES {
            model.set_mode(mode);
            assert_close(
                &format!("{name} {mode:?}"),
                &model.forward(&input_ids, None)?,
                &golden["logits"],
                LIMIT,
            )?;
        }
    }
    Ok(())
}

/// The original decoded the last tokens one at a time.
#[test]
fn prompt_then_token_by_token_in_every_mode() -> Result<()> {
    for name in GOLDEN {
        let (mut model, input_ids, golden) = open(name, None)?;
        let steps = golden["logits_step"].dim(1)?;
        let prompt = input_ids.dim(1)? - steps;
        for mode in MODES {
            model.set_mode(mode);
            let logits = stepwise(&model, &input_ids, prompt)?;
            let what = format!("{name} {mode:?}");
            assert_close(&what, &logits.narrow(1, prompt, steps)?, &golden["logits_step"], LIMIT)?;
            assert_close(&what, &logits, &golden["logits"], LIMIT)?;
        }
    }
    Ok(())
}

#[test]
fn token_by_token_from_the_start() -> Result<()> {
    for name in GOLDEN {
        let (model, input_ids, golden) = open(name, None)?;
        assert_close(name, &stepwise(&model, &input_ids, 0)?, &golden["logits"], LIMIT)?;
    }
    Ok(())
}

#[test]
fn a_batch_gives_what_its_rows_give() -> Result<()> {
    for name in GOLDEN {
        let (model, input_ids, golden) = open(name, None)?;
        let other = ((input_ids.to_dtype(DType::F32)? * -1.)? + 95.)?.to_dtype(DType::U32)?;
        let batch = Tensor::cat(&[&input_ids, &other], 0)?;
        let logits = stepwise(&model, &batch, 70)?;
        assert_close(name, &logits.narrow(0, 0, 1)?, &golden["logits"], LIMIT)?;
        assert_close(name, &logits.narrow(0, 1, 1)?, &model.forward(&other, None)?, LIMIT)?;
    }
    Ok(())
}

/// Models whose routers, which are random here, hardly prefer any expert: sixteen bits send some tokens elsewhere.
const SENT_ELSEWHERE: [&str; 3] = ["qwen3_next", "minimax", "kimi_linear"];

fn most_tokens_close(what: &str, x: &Tensor, reference: &Tensor, limit: f64) -> Result<()> {
    let row = |t| relative_error(&x.narrow(1, t, 1)?, &reference.narrow(1, t, 1)?);
    let mut errors = (0..x.dim(1)?).map(row).collect::<Result<Vec<_>>>()?;
    errors.sort_by(f64::total_cmp);
    let median = errors[errors.len() / 2];
    assert!(median <= limit, "{what}: half of the tokens have a relative error above {median:.3e}");
    Ok(())
}

#[test]
fn sixteen_bits_stay_close() -> Result<()> {
    for name in GOLDEN {
        for (dtype, limit) in [(DType::F16, 7e-3), (DType::BF16, 5e-2)] {
            let (model, input_ids, golden) = open(name, Some(dtype))?;
            assert_eq!(model.dtype(), dtype);
            let logits = model.forward(&input_ids, None)?;
            assert_eq!(logits.dtype(), dtype);
            let what = format!("{name} {dtype:?}");
            let steps = stepwise(&model, &input_ids, 40)?;
            if SENT_ELSEWHERE.contains(&name) {
                most_tokens_close(&what, &logits, &golden["logits"], 2.5 * limit)?;
                most_tokens_close(&what, &steps, &golden["logits"], 2.5 * limit)?;
            } else {
                assert_close(&what, &logits, &golden["logits"], limit)?;
                assert_close(&what, &steps, &golden["logits"], limit)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_stored_dtype_is_the_default() -> Result<()> {
    let (model, ..) = open("gla", None)?;
    assert_eq!(model.dtype(), DType::F32);
    let folder = tempfile::tempdir()?;
    let source = golden_folder("gla");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json"))?;
    let mut tensors = candle_core::safetensors::load(source.join("model.safetensors"), &CPU)?;
    for (name, tensor) in &mut tensors {
        // Norms are often kept wide.
        if !name.contains("norm") {
            *tensor = tensor.to_dtype(DType::BF16)?;
        }
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    assert_eq!(Model::load(folder.path(), None, &CPU)?.dtype(), DType::BF16);
    Ok(())
}

#[test]
fn hidden_states_then_head_is_the_whole() -> Result<()> {
    let (model, input_ids, golden) = open("gla-tied", None)?;
    let hidden = model.hidden_states(&input_ids, None)?;
    assert_eq!(hidden.dims(), [1, 80, model.config().hidden_size()]);
    let last = hidden.narrow(1, 79, 1)?;
    assert_close("last", &model.logits(&last)?, &golden["logits"].narrow(1, 79, 1)?, LIMIT)?;
    assert_eq!(model.logits(&last.squeeze(1)?)?.dim(D::Minus1)?, model.config().vocab_size());
    Ok(())
}

/// The states are all there is: their size does not grow.
#[test]
fn the_cache_keeps_its_size_and_can_be_reset() -> Result<()> {
    let (model, input_ids, golden) = open("retnet", None)?;
    let mut cache = model.new_cache();
    assert_eq!((cache.bytes(), cache.tokens()), (0, 0));
    model.forward(&input_ids.narrow(1, 0, 1)?, Some(&mut cache))?;
    // Two layers of two heads of 16 x 32, f32.
    assert_eq!(cache.bytes(), 2 * 2 * 16 * 32 * 4);
    model.forward(&input_ids, Some(&mut cache))?;
    assert_eq!((cache.bytes(), cache.tokens()), (2 * 2 * 16 * 32 * 4, 81));
    cache.reset();
    assert_eq!((cache.bytes(), cache.tokens()), (0, 0));
    assert_close("after reset", &model.forward(&input_ids, Some(&mut cache))?, &golden["logits"], LIMIT)
}
