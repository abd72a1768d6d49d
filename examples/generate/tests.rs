//! Conversations of several turns on tiny models, against the same tokens read from the beginning.

use crate::{
    common::{
        runtime::{ComputeArgs, ModeArg, open_model},
        text::TextStream,
    },
    conversation::Conversation,
    generator::{End, Generator},
    reader::{PIECE, Reader},
    settings::Settings,
    template::ChatTemplate,
};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::{Cache, Config, Model};
use candle_nn::{VarBuilder, VarMap};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Map, Value, json};
use std::{collections::HashSet, path::Path};
use tokenizers::Tokenizer;

const SPECIAL: [&str; 4] = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"];
/// A vocabulary of the special tokens and every byte, and one whose models write nothing but ASCII.
const BYTES: usize = SPECIAL.len() + 256;
const ASCII: usize = SPECIAL.len() + 128;

/// Messages as they are: nothing that was said is ever written otherwise.
const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}";
/// As Qwen's: what was thought before earlier answers is left out, and so is its beginning, which the prompt has.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}\
    {% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}\
    <|im_end|>{{ '\n' }}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>{{ 'assistant\n<think>\n' }}{% endif %}";
/// As Mistral's: what the system says stands before the last message, and so moves.
const MOVING: &str = "{% for m in messages %}{% if m.role != 'system' %}\
    {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}\
    <|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}";

/// A token for every byte, ASCII first, behind the special ones.
fn tokenizer() -> Tokenizer {
    // As GPT-2 has it, bytes that are no printable character of Latin-1 are written as the characters from 256 on.
    let mut others = (256..).filter_map(char::from_u32);
    let letters = (0..=255u8).map(|byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae.. => char::from(byte),
        _ => others.next().unwrap(),
    });
    let mut vocab: Map<_, _> =
        (SPECIAL.len()..).zip(letters).map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    vocab.extend(SPECIAL.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))));
    let added = SPECIAL.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "special": id < 2, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let parts = json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    parts.to_string().parse().unwrap()
}

/// Writes a model of the kind of a golden one, with a vocabulary for the tokenizer and weights of a seed.
fn write_model(kind: &str, vocab: usize, dtype: DType, folder: &Path) -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(kind);
    let mut fields: Value = serde_json::from_str(&Config::from_file(golden.join("config.json"))?.to_json())?;
    fields["vocab_size"] = json!(vocab);
    fields["eos_token_id"] = Value::Null;
    let config = Config::from_json_str(&fields.to_string())?;
    let variables = VarMap::new();
    Model::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let mut rng = StdRng::seed_from_u64(3);
    let mut named: Vec<_> = variables.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut tensors = std::collections::HashMap::new();
    for (name, variable) in named {
        let mut tensor = variable.as_tensor().clone();
        if let &[_, inputs] = tensor.dims() {
            let deviation = 1.5 / (inputs as f32).sqrt();
            let values = (0..tensor.elem_count()).map(|_| rng.random_range(-deviation..deviation)).collect();
            tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?;
        }
        tensors.insert(name, tensor.to_dtype(dtype)?);
    }
    std::fs::write(folder.join("config.json"), config.to_json())?;
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

fn open(kind: &str, vocab: usize, dtype: DType, mode: ModeArg) -> Result<Model> {
    let folder = tempfile::tempdir()?;
    write_model(kind, vocab, dtype, folder.path())?;
    open_model(folder.path(), &ComputeArgs { dtype: None, quantize: None, mode, cpu: true })
}

pub fn settings() -> Settings {
    Settings {
        temperature: 1.,
        top_p: 1.,
        top_k: None,
        min_p: 0.,
        repeat_penalty: 1.,
        repeat_last_n: 0,
        seed: 5,
        max_new_tokens: 30,
        ends: None,
    }
}

fn template(source: &str) -> Result<ChatTemplate> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("chat_template.jinja"), source)?;
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<|im_end|>"}"#)?;
    ChatTemplate::load(folder.path())
}

/// The logits after one more token.
fn probe(model: &Model, state: Cache) -> Result<Vec<f32>> {
    let mut reader = Reader::new(model);
    reader.rewind(Some(state));
    Ok(reader.read(&[7])?.to_vec1()?)
}

fn error(x: &[f32], reference: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut x.iter().zip(reference).map(|(x, y)| x - y)) / norm(&mut reference.iter().copied())
}

#[test]
fn experiment() -> Result<()> {
    let tokenizer = tokenizer();
    for dtype in [DType::F32, DType::BF16] {
    for mode in [ModeArg::Auto, ModeArg::Recurrent] {
    for kind in ["linear_attn", "gla", "retnet", "hgrn2", "mamba2", "delta_net", "gated_deltanet", "kda", "rwkv7", "qwen3_5", "qwen3_next", "kimi_linear", "minimax", "olmo_hybrid"] {
        let model = open(kind, ASCII, dtype, mode)?;
        for source in [PLAIN, THINKING, MOVING] {
            let generator = Generator::new(&model, settings());
            let mut conversation =
                Conversation::new(generator, &tokenizer, template(source)?, Some("Be brief."));
            for message in ["Hi!", "What is a state? ".repeat(20).trim(), "So", "Why?"] {
                conversation.say(message, false, |_| Ok(true))?;
                let held = probe(&model, conversation.generator.reader.state())?;
                let read = conversation.ids.len() - conversation.unread;
                let mut at_once = Reader::new(&model);
                at_once.read_only(&conversation.ids[..read])?;
                let again = probe(&model, at_once.state())?;
                let error = error(&again, &held);
                println!("{dtype:?} {mode:?} {kind} {read} same {} {error:e}", again == held);
            }
        }
    }
    }
    }
    Ok(())
}
