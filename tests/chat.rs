//! Conversations of the `generate` example on tiny models, against the same tokens read from the beginning; and the tests
//! in its files.

// What only its main uses.
#![allow(dead_code)]

#[path = "../examples/generate/args.rs"]
mod args;
#[path = "../examples/common/mod.rs"]
mod common;
#[path = "../examples/generate/conversation.rs"]
mod conversation;
#[path = "../examples/generate/fields.rs"]
mod fields;
#[path = "../examples/generate/generator.rs"]
mod generator;
#[path = "../examples/generate/reader.rs"]
mod reader;
#[path = "../examples/generate/sampler.rs"]
mod sampler;
#[path = "../examples/generate/settings.rs"]
mod settings;
#[path = "../examples/generate/template.rs"]
mod template;
#[path = "../examples/generate/thinking.rs"]
mod thinking;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_linear_attn::models::{Cache, Config, Model};
use candle_nn::{VarBuilder, VarMap};
use common::{
    runtime::{ComputeArgs, ModeArg, open_model},
    text::TextStream,
};
use conversation::Conversation;
use generator::{End, Generator};
use rand::{Rng, SeedableRng, rngs::StdRng};
use reader::{PIECE, Reader};
use serde_json::{Map, Value, json};
use settings::Settings;
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};
use template::{ChatTemplate, Message};
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
    {{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}\
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
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
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
    let mut tensors = HashMap::new();
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

/// `||x - reference|| / ||reference||`
fn error(x: &[f32], reference: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut x.iter().zip(reference).map(|(x, y)| x - y)) / norm(&mut reference.iter().copied())
}

/// A session of four turns; after each the state must be that of the whole conversation, as the template writes it, read
/// from the beginning in one call. Gives the tokens that each turn read, those that it wrote, and those of the whole.
fn four_turns(model: &Model, source: &str, tolerance: f32) -> Result<Vec<(usize, usize, usize)>> {
    let tokenizer = tokenizer();
    let generator = Generator::new(model, Settings::plain());
    let mut conversation = Conversation::new(generator, &tokenizer, template(source)?, Some("Be brief."));
    let mut messages = vec![Message::new("system", "Be brief.")];
    let mut turns = vec![];
    for message in ["Hi!", "What is a state? ".repeat(20).trim(), "So", "Why?"] {
        let before = conversation.prompt_tokens;
        let mut shown = String::new();
        conversation.say(message, false, |piece| {
            shown += piece;
            Ok(true)
        })?;
        messages.push(Message::new("user", message));
        let prompt = template(source)?.render(&messages, true)?;
        let answer = if prompt.ends_with("<think>\n") { &shown["<think>\n".len()..] } else { &shown };
        let ids = &conversation.ids;
        messages.push(Message::answer(&prompt, answer));
        assert_eq!(tokenizer.decode(ids, false).unwrap(), prompt + answer);

        let held = probe(model, conversation.generator.reader.state())?;
        let mut whole = Reader::new(model);
        whole.read_only(&ids[..ids.len() - conversation.unread])?;
        let error = error(&held, &probe(model, whole.state())?);
        assert!(error <= tolerance, "{}: {message}: {error:e}", model.config().model_type());
        let written = tokenizer.encode(answer, false).unwrap().len();
        turns.push((conversation.prompt_tokens - before, written, ids.len()));
    }
    Ok(turns)
}

#[test]
fn the_state_carried_between_turns_is_that_of_the_whole_conversation_to_the_bit() -> Result<()> {
    for kind in
        ["gla", "retnet", "hgrn2", "mamba2", "gated_deltanet", "kda", "rwkv7", "qwen3_5", "kimi_linear"]
    {
        // Stored in 16 bits, as chat models are: the product of a row and such weights does not depend on other rows.
        let model = open(kind, ASCII, DType::BF16, ModeArg::Recurrent)?;
        for source in [PLAIN, THINKING, MOVING] {
            four_turns(&model, source, 0.)?;
        }
    }
    Ok(())
}

#[test]
fn other_modes_and_weights_give_it_to_rounding() -> Result<()> {
    for (kind, mode) in
        [("gla", ModeArg::Auto), ("gated_deltanet", ModeArg::Chunk), ("qwen3_5", ModeArg::Auto)]
    {
        four_turns(&open(kind, ASCII, DType::F32, mode)?, PLAIN, 1e-5)?;
    }
    Ok(())
}

#[test]
fn a_turn_reads_what_is_new_and_the_last_answer_if_it_is_written_otherwise() -> Result<()> {
    let model = open("gla", ASCII, DType::F32, ModeArg::Auto)?;
    let plain = four_turns(&model, PLAIN, 1e-5)?;
    let mut total = 0;
    for (read, written, whole) in plain {
        total += read + written;
        assert_eq!(total, whole);
    }
    let (mut before, mut answer) = (0, 0);
    for (read, written, whole) in four_turns(&model, THINKING, 1e-5)? {
        // It went back over no more than the last answer and what the prompt had begun it with.
        assert_eq!(before + read + written - whole, answer);
        let introduction = tokenizer().encode("<|im_start|>assistant\n<think>\n", false).unwrap().len();
        (before, answer) = (whole, introduction + written);
    }
    for (read, written, whole) in four_turns(&model, MOVING, 1e-5)? {
        assert_eq!(read + written, whole);
    }
    Ok(())
}

/// What is said to a message, greedily.
fn answer(conversation: &mut Conversation, message: &str) -> Result<String> {
    let mut shown = String::new();
    conversation.say(message, false, |piece| {
        shown += piece;
        Ok(true)
    })?;
    Ok(shown)
}

#[test]
fn after_a_reset_a_conversation_is_a_new_one() -> Result<()> {
    let (tokenizer, model) = (tokenizer(), open("gla", ASCII, DType::F32, ModeArg::Auto)?);
    for source in [PLAIN, THINKING] {
        let generator = Generator::new(&model, Settings { temperature: 0., ..Settings::plain() });
        let mut conversation = Conversation::new(generator, &tokenizer, template(source)?, Some("Be brief."));
        let first = [answer(&mut conversation, "Hi!")?, answer(&mut conversation, "Why?")?];
        for _ in 0..2 {
            conversation.reset();
            let again = [answer(&mut conversation, "Hi!")?, answer(&mut conversation, "Why?")?];
            assert_eq!(again, first);
            conversation.reset();
            answer(&mut conversation, "Hello!")?;
        }
        assert_ne!(first[0], first[1]);
    }
    Ok(())
}

#[test]
fn characters_of_several_tokens_are_shown_whole() -> Result<()> {
    let tokenizer = tokenizer();
    let text = "snow ❄, äöü, 中文 and 👩‍🚀!";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(ids.len(), text.len());
    let mut stream = TextStream::after(&tokenizer, &[], false)?;
    let pieces: Vec<_> = ids.get_ids().iter().map(|id| stream.push(*id)).collect::<Result<_>>()?;
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().all(|piece| piece.chars().count() <= 1), "{pieces:?}");
    Ok(())
}

/// The model writes one byte at a time, most of which are half a character that no message can hold.
#[test]
fn half_a_character_at_the_end_of_an_answer_is_forgotten() -> Result<()> {
    let (tokenizer, model) = (tokenizer(), open("gla", BYTES, DType::BF16, ModeArg::Recurrent)?);
    let generator = Generator::new(&model, Settings { max_new_tokens: 1, ..Settings::plain() });
    let mut conversation = Conversation::new(generator, &tokenizer, template(PLAIN)?, None);
    let mut messages = vec![];
    let mut halves = 0;
    for _ in 0..8 {
        let shown = answer(&mut conversation, "ä?")?;
        messages.push(Message::new("user", "ä?"));
        let prompt = tokenizer.encode(template(PLAIN)?.render(&messages, true)?, false).unwrap();
        assert!(conversation.ids.starts_with(prompt.get_ids()));
        halves += usize::from(shown.is_empty() && conversation.ids.len() > prompt.len());
        messages.push(Message::answer("", &shown));
    }
    assert!(halves > 0);
    Ok(())
}

#[test]
fn an_answer_ends_by_the_token_of_the_tokenizer_those_of_the_file_or_the_limit() -> Result<()> {
    let (tokenizer, model) = (tokenizer(), open("gla", ASCII, DType::F32, ModeArg::Auto)?);
    let end = |ends: Option<HashSet<u32>>, max_new_tokens| -> Result<(End, u32)> {
        let generator = Generator::new(&model, Settings { max_new_tokens, ends, ..Settings::plain() });
        let mut conversation = Conversation::new(generator, &tokenizer, template(PLAIN)?, None);
        let end = conversation.say("Hi!", false, |_| Ok(true))?;
        Ok((end, conversation.ids.len() as u32))
    };
    let (limit, length) = end(None, 2)?;
    assert_eq!(limit, End::Limit);
    assert_eq!(end(Some((0..ASCII as u32).collect()), 2)?, (End::Token, length - 2));
    // `<|im_end|>`, which is nowhere else.
    assert_eq!(end(None, 5000)?.0, End::Token);
    Ok(())
}

#[test]
fn a_conversation_that_cannot_go_on_says_why() -> Result<()> {
    let (tokenizer, model) = (tokenizer(), open("gla", ASCII, DType::F32, ModeArg::Auto)?);
    let message = |source: &str, text: &str| -> Result<String> {
        let generator = Generator::new(&model, Settings::plain());
        let mut conversation = Conversation::new(generator, &tokenizer, template(source)?, Some("Be brief."));
        Ok(format!("{:#}", answer(&mut conversation, text).unwrap_err()))
    };
    assert!(message("", "Hi!")?.contains("adds nothing for a message"));
    let refusal = "{{ raise_exception('System role not supported') }}";
    assert!(message(refusal, "Hi!")?.contains("System role not supported"));
    assert!(message(PLAIN, "ä")?.contains("they do not belong together"));
    Ok(())
}

#[test]
fn a_long_prompt_is_read_in_pieces_with_a_state_that_does_not_grow() -> Result<()> {
    let model = open("gla", ASCII, DType::F32, ModeArg::Auto)?;
    let ids: Vec<u32> = (0..2 * PIECE as u32 + 100).map(|i| i * i % ASCII as u32).collect();
    let mut reader = Reader::new(&model);
    let logits: Vec<f32> = reader.read(&ids)?.to_vec1()?;
    let mut piece_by_piece = Reader::new(&model);
    let mut last: Vec<f32> = vec![];
    for piece in ids.chunks(PIECE) {
        last = piece_by_piece.read(piece)?.to_vec1()?;
    }
    assert_eq!(logits, last);
    let mut short = Reader::new(&model);
    short.read(&ids[..5])?;
    assert_eq!(reader.peak_state, short.peak_state);
    Ok(())
}
