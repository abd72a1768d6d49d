//! The `train` example: its parts, and whole runs of it.

#[path = "../examples/common/mod.rs"]
mod common;
#[allow(dead_code)] // not all of it is under test here
#[path = "../examples/train/data.rs"]
mod data;
#[path = "../examples/train/evaluate.rs"]
mod evaluate;
mod examples;
#[path = "../examples/train/loss.rs"]
mod loss;
#[allow(dead_code)] // likewise
#[path = "../examples/train/optimizer.rs"]
mod optimizer;
#[allow(dead_code)] // likewise
#[path = "../examples/train/params.rs"]
mod params;
#[allow(dead_code)] // likewise
#[path = "models/support.rs"]
mod support;
#[allow(dead_code)] // likewise
#[path = "../examples/train/workers.rs"]
mod workers;

use candle_core::{DType, Device, Tensor, Var};
use candle_linear_attn::models::{Config, Model, SUPPORTED};
use candle_nn::{VarBuilder, VarMap};
use data::{Batches, TokenStream};
use examples::{example, fail, succeed, train_tiny};
use optimizer::{AdamW, Hyperparameters, Schedule};
use params::Parameters;
use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    process::Stdio,
    time::Duration,
};
use workers::Workers;

const STATE: &str = "training-state.safetensors";

const HYPER: Hyperparameters =
    Hyperparameters { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.5 };

#[test]
fn adamw_follows_its_paper() -> anyhow::Result<()> {
    let (start, lr) = ([0.5f32, -1.0], 0.1);
    for (name, decay) in [("head.weight", 0.1), ("embeddings.weight", 0.0)] {
        let var = Var::from_tensor(&Tensor::from_slice(&start, (1, 2), &Device::Cpu)?)?;
        let mut adamw = AdamW::new(BTreeMap::from([(name.to_owned(), var.clone())]), HYPER)?;
        let (mut x, mut m, mut v) = (start.map(f64::from), [0f64; 2], [0f64; 2]);
        for t in 0..5 {
            let grad = [0.3 * (t as f64 + 1.0), -0.4 * (t as f64 + 1.0)];
            let norm = grad[0].hypot(grad[1]);
            let tensor = Tensor::new(&[grad.map(|g| g as f32)], &Device::Cpu)?;
            let measured = AdamW::norm(std::slice::from_ref(&tensor))?.to_scalar::<f32>()?;
            assert!((f64::from(measured) - norm).abs() < 1e-5);
            adamw.step(t, lr, &[tensor], norm)?;
            for i in 0..2 {
                let g = grad[i] * f64::min(1.0, 1.5 / norm);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let m_hat = m[i] / (1.0 - 0.9f64.powi(t as i32 + 1));
                let v_hat = v[i] / (1.0 - 0.95f64.powi(t as i32 + 1));
                x[i] = x[i] - lr * decay * x[i] - lr * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        let got = var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
        for (got, x) in got.iter().zip(x) {
            assert!((f64::from(*got) - x).abs() < 1e-5, "{name}: {got} {x}");
        }
    }
    Ok(())
}

#[test]
fn the_learning_rate_warms_up_and_follows_a_cosine_down() {
    let schedule = Schedule { peak: 1.0, last: 0.1, warmup: 4, steps: 105 };
    assert_eq!(schedule.at(0), 0.25);
    assert_eq!(schedule.at(3), 1.0);
    assert_eq!(schedule.at(4), 1.0);
    assert!((schedule.at(54) - 0.55).abs() < 1e-12);
    assert!((schedule.at(104) - 0.1).abs() < 1e-12);
    assert!((5..105).all(|step| schedule.at(step) < schedule.at(step - 1)));
}

#[test]
fn token_nll_is_log_softmax_and_gather_forward_and_backward() -> anyhow::Result<()> {
    let logits = Var::randn(0f32, 5.0, (7, 11), &Device::Cpu)?;
    let targets = Tensor::new(&[0u32, 10, 3, 3, 5, 9, 1], &Device::Cpu)?;
    let weights = Tensor::randn(0f32, 1.0, 7, &Device::Cpu)?;
    let mut results = Vec::new();
    let derived = |logits: &Tensor, targets: &Tensor| -> candle_core::Result<Tensor> {
        candle_nn::ops::log_softmax(logits, 1)?.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()
    };
    for token_nll in [derived, loss::token_nll, loss::composed_token_nll] {
        let nll = token_nll(&logits, &targets)?;
        let grads = (&nll * &weights)?.sum_all()?.backward()?;
        results.push((nll, grads.get(&logits).cloned().unwrap()));
    }
    let difference = |a: &Tensor, b: &Tensor| -> candle_core::Result<f32> {
        (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
    };
    for (nll, gradient) in &results[1..] {
        assert!(difference(nll, &results[0].0)? < 1e-5);
        assert!(difference(gradient, &results[0].1)? < 1e-5);
    }
    assert!(loss::token_nll(&logits, &Tensor::full(11u32, 7, &Device::Cpu)?).is_err());
    Ok(())
}

/// The gradient of every parameter of a small model, all in one tensor, at values at which each of them matters, or at what
/// `round` makes of these.
fn gradient(fields: &str, dtype: DType, round: impl Fn(Tensor) -> candle_core::Result<Tensor>) -> Tensor {
    let compute = || -> anyhow::Result<Tensor> {
        let parameters = Parameters::new(0);
        let config = support::small_config(fields)?;
        let model = Model::new(&config, parameters.var_builder(dtype, &Device::Cpu))?;
        for (i, (_, var)) in parameters.vars().into_iter().enumerate() {
            let shift = if var.rank() == 1 { 0.5 } else { 0.0 };
            var.set(&round(support::pseudo_random(var.dims(), i as u64)?.affine(0.2, shift)?)?)?;
        }
        let (inputs, targets) = (support::pseudo_tokens(2, 65, 11)?, support::pseudo_tokens(5, 26, 11)?);
        let logits = model.forward(&inputs, None)?.flatten_to(1)?;
        assert_eq!(logits.dtype(), dtype);
        let loss = loss::token_nll(&logits.to_dtype(DType::F32)?, &targets.flatten_all()?)?.mean_all()?;
        let adamw = AdamW::new(parameters.vars(), HYPER)?;
        let grads = adamw.collect(&mut loss.backward()?)?;
        assert!(grads.iter().all(|grad| grad.dtype() == DType::F32));
        let flat = grads.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    };
    compute().unwrap_or_else(|error| panic!("{fields}: {error}"))
}

/// How much rounding matters to a gradient depends on the model. It is measured: what rounding each parameter once does.
#[test]
fn gradients_in_bf16_are_those_in_f32_but_for_rounding() -> anyhow::Result<()> {
    for model_type in SUPPORTED {
        let fields = format!(r#"{}, "use_short_conv": true"#, support::small_heads(model_type));
        let expected = gradient(&fields, DType::F32, Ok);
        let found = gradient(&fields, DType::BF16, Ok);
        let rounded = gradient(&fields, DType::F32, |x| x.to_dtype(DType::BF16)?.to_dtype(DType::F32));
        let error = support::relative_error(&found, &expected)?;
        let limit = 0.01 + 3.0 * support::relative_error(&rounded, &expected)?;
        assert!(error > 1e-3, "{model_type}: error {error}, which is not that of bf16");
        assert!(error < limit && limit < 0.4, "{model_type}: error {error}, at most {limit} is allowed");
    }
    Ok(())
}

#[test]
fn an_epoch_visits_each_window_once_and_the_next_one_in_another_order() -> anyhow::Result<()> {
    let stream = TokenStream { tokens: (0..1000).collect(), text_bytes: 1000 };
    let batches = Batches::new(&stream, 7, 3)?;
    let windows = 999 / 7 - 1;
    let starts = |epoch: u64| -> anyhow::Result<Vec<u32>> {
        let (inputs, targets) = batches.get(epoch * windows, windows as usize, &Device::Cpu)?;
        assert_eq!((&inputs + 1.0)?.to_vec2::<u32>()?, targets.to_vec2::<u32>()?);
        Ok(inputs.narrow(1, 0, 1)?.flatten_all()?.to_vec1()?)
    };
    let (first, second) = (starts(0)?, starts(1)?);
    for starts in [&first, &second] {
        let distinct: HashSet<u32> = starts.iter().map(|start| start / 7).collect();
        assert_eq!(distinct.len(), windows as usize);
        assert!(starts.iter().all(|start| start % 7 == starts[0] % 7));
    }
    assert_ne!(first, second);
    assert!(Batches::new(&stream, 1000, 3).is_err());
    Ok(())
}

fn small_config() -> Config {
    let config = r#"{"model_type": "gla", "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 9}"#;
    Config::from_json_str(config).unwrap()
}

/// Texts of different lengths over tokens 1..=8, with 0 between them.
fn small_stream() -> TokenStream {
    let mut tokens = vec![0];
    for text in 0..60u32 {
        tokens.extend((0..3 + text * 7 % 11).map(|i| 1 + (text * text + 3 * i) % 8));
        tokens.push(0);
    }
    TokenStream { tokens, text_bytes: 1234 }
}

#[test]
fn a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token() -> anyhow::Result<()> {
    let model = Model::new(&small_config(), VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    let stream = small_stream();
    let expected = (stream.tokens.len() - 1) as f64 * 9f64.log2() / 1234.0;
    let workers = Workers::new(&Device::Cpu)?;
    let bits = evaluate::bits_per_byte(&model, &stream, 0, 8, &workers)?;
    assert!((bits / expected - 1.0).abs() < 1e-5, "{bits} {expected}");
    Ok(())
}

#[test]
fn bits_per_byte_do_not_depend_on_where_windows_end() -> anyhow::Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    Model::new(&small_config(), vb)?;
    let values = vars
        .data()
        .lock()
        .unwrap()
        .iter()
        .map(|(name, var)| (name.clone(), var.as_detached_tensor()))
        .collect();
    let model = Model::new(&small_config(), VarBuilder::from_tensors(values, DType::F32, &Device::Cpu))?;
    let workers = Workers::new(&Device::Cpu)?;
    let whole = evaluate::bits_per_byte(&model, &small_stream(), 0, 10_000, &workers)?;
    for seq_len in [1, 5, 16] {
        let bits = evaluate::bits_per_byte(&model, &small_stream(), 0, seq_len, &workers)?;
        assert!((bits / whole - 1.0).abs() < 1e-5, "{seq_len}: {bits} {whole}");
    }
    Ok(())
}

fn log_rows(out: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(out.join("log.csv")).unwrap_or_default();
    text.lines().skip(1).map(|line| line.split(',').map(str::to_owned).collect()).collect()
}

#[test]
fn a_killed_run_ends_with_the_same_bits_as_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--steps", "100", "--eval-every", "30", "--dtype", "f32"];
    let (mut whole, expected) = train_tiny(folder.path(), "whole", &arguments);
    succeed(&mut whole);

    let (mut command, out) = train_tiny(folder.path(), "killed", &arguments);
    let mut killed = 0;
    for rows in [1, 6, 7, 15, 33] {
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        while log_rows(&out).len() < rows && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(killed > 1, "the runs were too quick to be killed");
    // What a kill in the middle of a write leaves behind.
    std::fs::write(out.join(".partial-left"), "half").unwrap();
    succeed(&mut command);
    assert!(!out.join(".partial-left").exists());

    for file in [STATE, "model.safetensors", "tokenizer.json", "config.json"] {
        let (a, b) = (std::fs::read(expected.join(file)).unwrap(), std::fs::read(out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    let without_speed = |out: &Path| -> Vec<Vec<String>> {
        let rows = log_rows(out).into_iter();
        rows.map(|row| row.into_iter().enumerate().filter(|(i, _)| *i != 5).map(|(_, x)| x).collect())
            .collect()
    };
    assert_eq!(without_speed(&out), without_speed(&expected));
    assert_eq!(log_rows(&out).len(), 100);
}

#[test]
fn the_number_of_cores_changes_rounding_only() {
    let folder = tempfile::tempdir().unwrap();
    let losses = |cores: &str| -> Vec<f32> {
        let (mut command, out) = train_tiny(folder.path(), cores, &["--steps", "4", "--batch-size", "5"]);
        succeed(command.env("RAYON_NUM_THREADS", cores));
        log_rows(&out).iter().map(|row| row[2].parse().unwrap()).collect()
    };
    let one = losses("1");
    for cores in ["3", "8"] {
        for (a, b) in losses(cores).iter().zip(&one) {
            assert!((a / b - 1.0).abs() < 1e-4, "{cores}: {a} {b}");
        }
    }
}

#[test]
fn every_model_type_learns_and_is_read_by_generate_and_logits() {
    let folder = tempfile::tempdir().unwrap();
    let valid = folder.path().join("valid.txt");
    examples::write_stories(&valid, 20);
    let valid = valid.to_str().unwrap();
    for (model_type, more) in [
        ("gla", &["--tie-embeddings"][..]),
        ("linear_attn", &["--set", "feature_map=\"elu\"", "--mode", "chunk"]),
        ("retnet", &["--grad-accum", "2", "--dtype", "f32"]),
        ("hgrn2", &["--dtype", "f32"]),
        ("mamba2", &[]),
        ("delta_net", &["--dtype", "f32"]),
        ("gated_deltanet", &["--set", "num_v_heads=4"]),
        ("kda", &["--set", "lower_bound=-5.0"]),
        ("rwkv7", &["--dtype", "f32"]),
    ] {
        let arguments = ["--model-type", model_type, "--steps", "40", "--valid", valid, "--eval-every", "20"];
        let (mut train, out) = train_tiny(folder.path(), model_type, &[&arguments, more].concat());
        succeed(&mut train);
        let rows = log_rows(&out);
        let loss = |row: usize| rows[row][2].parse::<f32>().unwrap();
        assert!(loss(39) < 0.7 * loss(0), "{model_type}: {} to {}", loss(0), loss(39));
        let bits = |row: usize| rows[row][6].parse::<f64>().unwrap();
        assert!(bits(39) < bits(19), "{model_type}: {} to {}", bits(19), bits(39));
        let picture = std::fs::read_to_string(out.join("loss.svg")).unwrap();
        for part in ["<svg ", "train loss, nats per token", "validation, bits per byte", "</svg>"] {
            assert!(picture.contains(part), "{part}: {picture}");
        }
        // Losses, raw and smoothed, and bits per byte.
        let curves = picture.matches("<polyline ").count();
        assert!(curves >= 3, "{curves} lines in {picture}");

        let mut evaluate = example("train");
        evaluate.arg("--eval-only").arg(&out).args(["--valid", valid, "--seq-len", "32"]);
        let printed: f64 = succeed(&mut evaluate).split(' ').next().unwrap().parse().unwrap();
        assert!((printed / bits(39) - 1.0).abs() < 1e-2, "{model_type}: {printed} {}", bits(39));

        let mut generate = example("generate");
        generate.arg("--model").arg(&out).args(["--prompt", "Once upon", "-n", "12"]);
        let text = succeed(&mut generate);
        assert!(text.starts_with("Once upon") && text.trim_end().len() > "Once upon".len(), "{text}");

        let file = out.join("logits.safetensors");
        let mut logits = example("logits");
        logits.arg("--model").arg(&out).args(["--tokens", "0,5,17,3", "--split", "2", "--output"]).arg(&file);
        succeed(&mut logits);
        let logits = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        assert_eq!(logits["logits"].dim(0).unwrap(), 4);
    }
}

#[test]
fn a_run_out_of_time_can_be_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let (mut command, out) = train_tiny(folder.path(), "run", &["--steps", "20", "--eval-every", "0"]);
    succeed(command.args(["--max-minutes", "1e-9"]));
    assert_eq!(log_rows(&out).len(), 1);
    assert!(out.join("model.safetensors").is_file());
    succeed(&mut train_tiny(folder.path(), "run", &["--steps", "20", "--eval-every", "0"]).0);
    assert_eq!(log_rows(&out).len(), 20);
}

#[test]
fn a_folder_of_another_run_is_refused_by_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, out) = train_tiny(folder.path(), "run", &["--steps", "2"]);
    succeed(&mut first);
    let state = std::fs::read(out.join(STATE)).unwrap();
    let (mut other, _) = train_tiny(folder.path(), "run", &["--steps", "2", "--lr", "0.5", "--heads", "4"]);
    let message = fail(&mut other);
    for part in ["other settings", "lr was 0.01, is 0.5", "config.num_heads was 2, is 4", "another --out"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(state == std::fs::read(out.join(STATE)).unwrap());
    // The same settings again: there is nothing left to do.
    succeed(&mut first);
    assert!(state == std::fs::read(out.join(STATE)).unwrap());
}

#[test]
fn a_run_in_bf16_learns_keeps_f32_and_is_resumed_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let valid = folder.path().join("valid.txt");
    examples::write_stories(&valid, 20);
    let arguments = ["--model-type", "gated_deltanet", "--compute-dtype", "bf16", "--steps", "30"];
    let arguments = [&arguments[..], &["--valid", valid.to_str().unwrap(), "--eval-every", "10"]].concat();
    let (mut whole, expected) = train_tiny(folder.path(), "whole", &arguments);
    succeed(&mut whole);
    let rows = log_rows(&expected);
    let number = |row: usize, column: usize| rows[row][column].parse::<f64>().unwrap();
    assert!(number(29, 2) < 0.7 * number(0, 2), "{} to {}", number(0, 2), number(29, 2));
    assert!(number(29, 6) < number(9, 6), "{} to {}", number(9, 6), number(29, 6));
    let state = candle_core::safetensors::load(expected.join(STATE), &Device::Cpu).unwrap();
    assert!(state.values().all(|tensor| tensor.dtype() == DType::F32));

    let (mut command, out) = train_tiny(folder.path(), "stopped", &arguments);
    for _ in 0..2 {
        let (mut stopped, _) = train_tiny(folder.path(), "stopped", &arguments);
        succeed(stopped.args(["--max-minutes", "1e-9"]));
    }
    assert_eq!(log_rows(&out).len(), 2);
    succeed(&mut command);
    for file in [STATE, "model.safetensors"] {
        let (a, b) = (std::fs::read(expected.join(file)).unwrap(), std::fs::read(out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }

    // On a CPU that is f32.
    let message =
        fail(&mut train_tiny(folder.path(), "stopped", &[&arguments[..2], &arguments[4..]].concat()).0);
    assert!(message.contains("compute-dtype was \"bf16\", is \"f32\""), "{message}");
}

/// Runs of before `--compute-dtype` say nothing of it.
#[test]
fn a_run_that_does_not_say_what_it_computes_in_was_in_f32() {
    let folder = tempfile::tempdir().unwrap();
    let (mut command, out) = train_tiny(folder.path(), "run", &["--steps", "2"]);
    succeed(&mut command);
    let state = std::fs::read(out.join(STATE)).unwrap();
    let start = 8 + u64::from_le_bytes(state[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(state[8..start].to_vec()).unwrap();
    let entry = r#"\"compute-dtype\":\"f32\","#;
    assert!(header.contains(entry), "{header}");
    let header = header.replace(entry, &" ".repeat(entry.len()));
    let old = [&state[..8], header.as_bytes(), &state[start..]].concat();
    std::fs::write(out.join(STATE), &old).unwrap();

    let (mut other, _) = train_tiny(folder.path(), "run", &["--steps", "2", "--compute-dtype", "bf16"]);
    let message = fail(&mut other);
    assert!(message.contains("compute-dtype was \"f32\", is \"bf16\""), "{message}");
    succeed(&mut command);
    assert!(old == std::fs::read(out.join(STATE)).unwrap(), "there was nothing left to do");
}

#[test]
fn a_broken_training_state_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (mut command, out) = train_tiny(folder.path(), "run", &["--steps", "2"]);
    succeed(&mut command);
    let state = std::fs::read(out.join(STATE)).unwrap();
    for broken in [&state[..state.len() / 2], &state[..5], b"not tensors at all"] {
        std::fs::write(out.join(STATE), broken).unwrap();
        let message = fail(&mut command);
        assert!(message.contains("cannot resume from") && message.contains(STATE), "{message}");
    }
}

/// The least that there is anything to predict in.
#[test]
fn texts_shorter_than_a_window_can_be_validated_on() {
    let folder = tempfile::tempdir().unwrap();
    for (i, text) in
        ["a", "<|endoftext|>a", "a\n<|endoftext|>\nb", "Once upon a time"].into_iter().enumerate()
    {
        let valid = folder.path().join("valid.txt");
        std::fs::write(&valid, text).unwrap();
        let arguments = ["--valid", valid.to_str().unwrap(), "--steps", "1"];
        let (mut command, out) = train_tiny(folder.path(), &format!("run{i}"), &arguments);
        succeed(&mut command);
        let bits: f64 = log_rows(&out)[0][6].parse().unwrap();
        assert!(bits.is_finite() && bits > 0.0, "{text:?}: {bits}");
    }
    for nothing in ["", "\n", "<|endoftext|>\n<|endoftext|>\n"] {
        let valid = folder.path().join("empty.txt");
        std::fs::write(&valid, nothing).unwrap();
        let message = fail(&mut train_tiny(folder.path(), "none", &["--valid", valid.to_str().unwrap()]).0);
        assert!(message.contains("empty.txt has no text in it"), "{nothing:?}: {message}");
    }
}

#[test]
fn bad_arguments_of_train_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, part) in [
        (&["--steps", "0"][..], "--steps is 0, must be at least 1"),
        (&["--lr", "-1"], "--lr is -1, must be a positive number"),
        (&["--beta2", "1"], "--beta2 is 1, must be in [0, 1)"),
        (&["--vocab-size", "10"], "--vocab-size is 10, must be at least 257"),
        (&["--model-type", "mamba9"], "--model-type is \"mamba9\", must be one of"),
        (&["--model-type", "qwen3_next"], "--model-type is \"qwen3_next\", which has more sizes"),
        (&["--seq-len", "1000000"], "--seq-len is 1000000, must be less than"),
        (&["--set", "expand_q=1.0"], "--set expand_q: a model of type gla has no such field"),
        (&["--set", "expand_k"], "must be FIELD=JSON"),
        (&["--set", "expand_k=big"], "is not JSON"),
        (&["--heads", "3"], "num_heads"),
        (&["--valid", "nowhere.txt"], "cannot read nowhere.txt"),
        (&["--tokenizer", "nowhere.json"], "no tokenizer at nowhere.json"),
        (&["--config", "nowhere.json"], "--config"),
        (&["--lr", "nan"], "--lr is NaN, must be a positive number"),
        (&["--lr", "inf"], "--lr is inf, must be a positive number"),
        (&["--min-lr", "0.5"], "--min-lr is 0.5, must be at most --lr, 0.01"),
        (&["--weight-decay", "nan"], "--weight-decay is NaN"),
        (&["--clip", "0"], "--clip is 0, must be a positive number"),
        (&["--batch-size", "0"], "--batch-size is 0, must be at least 1"),
        (&["--seq-len", "0"], "--seq-len is 0, must be at least 1"),
        (&["--grad-accum", "0"], "--grad-accum is 0, must be at least 1"),
        (&["--steps", "18446744073709551615"], "more tokens than can be counted"),
        (&["--batch-size", "100000000000"], "not enough memory for the logits of --batch-size 100000000000"),
        (&["--vocab-size", "18446744073709551615"], "and at most 1048576"),
        // For the logits or for the weights: which are missed first depends on the machine.
        (&["--hidden-size", "67108864", "--set", "vocab_size=67108864"], "not enough memory"),
        (&["--layers", "0"], "num_hidden_layers"),
        (&["--max-minutes", "inf"], "--max-minutes is inf, must be more than 0 and at most"),
        (&["--max-minutes", "nan"], "--max-minutes is NaN"),
        (&["--end-token", ""], "--end-token is empty"),
        (&["--end-token", "$A"], "--end-token is \"$A\", must not begin with $"),
        (&["--end-token", "a:1"], "--end-token is \"a:1\", must not begin with $ nor have a colon"),
        (&["--set", "vocab_size=\"many\""], "vocab_size"),
        (&["--set", "vocab_size=1e300"], "vocab_size"),
    ] {
        let (mut command, _) = train_tiny(folder.path(), "run", arguments);
        let message = fail(&mut command);
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
    for arguments in [
        &["--model-type", "mamba9"][..],
        &["--heads", "3"],
        &["--hidden-size", "0"],
        &["--layers", "0"],
        &["--set", "hidden_act=\"tanh\""],
    ] {
        let (mut command, out) = train_tiny(folder.path(), "refused", arguments);
        fail(&mut command);
        assert!(!out.exists(), "{arguments:?} is refused late");
    }
    let mut no_data = example("train");
    let message = fail(no_data.args(["--data", "nowhere.txt", "--out"]).arg(folder.path().join("x")));
    assert!(message.contains("cannot read nowhere.txt"), "{message}");
}
