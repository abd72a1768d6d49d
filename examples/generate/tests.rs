//! Conversations of several turns, against the same tokens read from the beginning.

use crate::{
    common::runtime::{ComputeArgs, ModeArg, open_model},
    conversation::Conversation,
    generator::Generator,
    reader::Reader,
    settings::Settings,
    template::ChatTemplate,
    thinking::Thinking,
};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::{Cache, Config, Model};
use candle_nn::{VarBuilder, VarMap};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};
use tokenizers::{
    AddedToken, Tokenizer, decoders::byte_level::ByteLevel as Decoder, models::bpe::BPE,
    pre_tokenizers::byte_level::ByteLevel,
};

const VOCAB: usize = 300;
/// Messages as they are: nothing that was said is ever written otherwise.
const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}";
/// As Qwen's: what was thought before earlier answers is left out, and so is its beginning, which the prompt has.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}\
    {% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}\
    <|im_end|>{{ '\n' }}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>{{ 'assistant\n<think>\n' }}{% endif %}";

/// A token for every byte, and those of a chat.
fn tokenizer() -> Tokenizer {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort();
    let vocab = letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), id as u32));
    let model = BPE::builder().vocab_and_merges(vocab.collect::<HashMap<_, _>>(), vec![]).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(Decoder::default()));
    tokenizer
        .add_special_tokens([AddedToken::from("<|im_start|>", true), AddedToken::from("<|im_end|>", true)]);
    tokenizer.add_tokens([AddedToken::from("<think>", false), AddedToken::from("</think>", false)]);
    tokenizer
}

/// Writes a model of the kind of a golden one, with a vocabulary for the tokenizer and weights of a seed.
fn write_model(kind: &str, folder: &Path) -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(kind);
    let mut fields: Value = serde_json::from_str(&std::fs::read_to_string(golden.join("config.json"))?)?;
    fields["vocab_size"] = json!(VOCAB);
    let config = Config::from_json_str(&fields.to_string())?;
    let variables = VarMap::new();
    Model::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let mut rng = StdRng::seed_from_u64(3);
    let mut named: Vec<_> = variables.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (_, variable) in named.iter().filter(|(_, variable)| variable.rank() == 2) {
        let deviation = 1.5 / (variable.dim(1)? as f32).sqrt();
        let values = (0..variable.elem_count()).map(|_| rng.random_range(-deviation..deviation)).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu)?)?;
    }
    std::fs::write(folder.join("config.json"), config.to_json())?;
    Ok(variables.save(folder.join("model.safetensors"))?)
}

fn open(kind: &str) -> Result<Model> {
    let folder = tempfile::tempdir()?;
    write_model(kind, folder.path())?;
    let compute = ComputeArgs { dtype: None, quantize: None, mode: ModeArg::Auto, cpu: true };
    open_model(folder.path(), &compute)
}

fn settings() -> Settings {
    Settings {
        temperature: 1.,
        top_p: 1.,
        top_k: None,
        repeat_penalty: 1.,
        repeat_last_n: 0,
        seed: 5,
        max_new_tokens: 30,
        ends: HashSet::new(),
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
fn four_turns_with_the_state_kept_are_the_conversation_read_from_the_beginning() -> Result<()> {
    let tokenizer = tokenizer();
    for kind in ["gla", "gated_deltanet", "mamba2", "qwen3_5"] {
        let model = open(kind)?;
        for source in [PLAIN, THINKING] {
            let generator = Generator::new(&model, settings());
            let mut conversation =
                Conversation::new(generator, &tokenizer, template(source)?, Some("Be brief."));
            let mut sent = 0;
            for message in ["Hi!", "What is a state? ".repeat(20).trim(), "ä", "Why?"] {
                sent += message.len();
                assert!(conversation.say(message, false, |_| Ok(true))?);
                let reader = &conversation.generator.reader;
                let held = probe(&model, reader.state())?;

                // In the same pieces, bit for bit; as a whole, to rounding.
                let mut again = Reader::new(&model);
                let mut whole = vec![];
                for (_, piece) in &reader.pieces {
                    again.read_only(piece)?;
                    whole.extend_from_slice(piece);
                }
                assert!(probe(&model, again.state())? == held, "{kind}: {message}");
                let mut at_once = Reader::new(&model);
                at_once.read_only(&whole)?;
                let error = error(&probe(&model, at_once.state())?, &held);
                assert!(error < 1e-5, "{kind}: {message}: {error:e}");
            }
            let read_again = conversation.prompt_tokens - sent;
            // The words around the messages, and for a template that drops thoughts the last answer of every turn.
            let most = if source == PLAIN { 4 * 40 } else { 4 * 40 + 3 * 60 };
            assert!(read_again < most, "{kind}: {read_again}");
        }
    }
    Ok(())
}

#[test]
fn thoughts_are_hidden_with_their_marks() {
    let tokenizer = tokenizer();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let shown = |prompt: &[u32], hide: bool, tokens: &[&str]| {
        let mut thinking = Thinking::new(&tokenizer, prompt, hide);
        tokens.iter().map(|token| thinking.filter(id(token), token.to_string())).collect::<String>()
    };
    let (open, close) = ("<think>", "</think>");
    assert_eq!(shown(&[], true, &[open, "a", close, "b", "c"]), "bc");
    assert_eq!(shown(&[id(open)], true, &["a", close, "b"]), "b");
    assert_eq!(shown(&[id(open), id(close)], true, &["a", "b"]), "ab");
    assert_eq!(shown(&[], false, &[open, "a", close, "b"]), "<think>a</think>b");
}
