//! The `generate` and `logits` examples.

mod examples;

use candle_core::{Device, Tensor};
use examples::{example, fail, succeed, train_tiny};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
};

/// A folder with a tiny model in `model`, trained once for all tests here.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    succeed(&mut train_tiny(folder.path(), "model", &["--steps", "60"]).0);
    folder
});

fn model() -> PathBuf {
    FOLDER.path().join("model")
}

fn generate(arguments: &[&str]) -> Command {
    let mut command = example("generate");
    command.arg("--model").arg(model()).args(arguments);
    command
}

#[test]
fn the_same_seed_writes_the_same_text_and_another_one_another() {
    let text = |seed: &str| {
        succeed(&mut generate(&["--prompt", "Once", "--temperature", "1.5", "-n", "40", "--seed", seed]))
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn all_modes_write_the_same_greedy_text() {
    let text = |mode: &str| succeed(&mut generate(&["--temperature", "0", "-n", "30", "--mode", mode]));
    let auto = text("auto");
    assert!(auto.len() > 60, "{auto}");
    for mode in ["recurrent", "chunk", "fused-chunk"] {
        assert_eq!(text(mode), auto, "{mode}");
    }
}

/// The ends of what is allowed: almost no token to choose from, and all of them alike.
#[test]
fn extreme_settings_still_write() {
    for arguments in [
        &["--top-p", "1e-50"][..],
        &["--top-p", "1e-50", "--top-k", "1"],
        &["--top-k", "18446744073709551615"],
        &["--temperature", "1e300"],
        &["--temperature", "1e-4"],
        &["--repeat-penalty", "1000", "--repeat-last-n", "18446744073709551615"],
        &["--repeat-penalty", "0.001", "--repeat-last-n", "0"],
    ] {
        let text = succeed(&mut generate(&[arguments, &["-n", "5"]].concat()));
        assert!(
            text.trim_end().len() > "Once upon a time, there was a little girl named Lily.".len(),
            "{text}"
        );
    }
}

#[test]
fn without_arguments_the_bundled_model_writes_or_it_is_said_where_to_get_it() {
    if Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model.safetensors").is_file() {
        let text = succeed(example("generate").args(["-n", "20"]));
        assert!(text.starts_with("Once upon a time") && text.trim_end().len() > 80, "{text}");
    } else {
        let message = fail(&mut example("generate"));
        assert!(message.contains("bundled checkpoint") && message.contains("--model"), "{message}");
    }
}

#[test]
fn a_prompt_may_come_from_stdin() {
    let arguments = |prompt| generate(&["--temperature", "0", "-n", "5", "--prompt", prompt]);
    let mut child = arguments("-").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("A little fox ❄\n".as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), succeed(&mut arguments("A little fox ❄")));
}

#[test]
fn speeds_and_state_size_are_reported() {
    let output = generate(&["-n", "3"]).output().unwrap();
    let report = String::from_utf8(output.stderr).unwrap();
    for part in ["prompt: ", "decode: 2 tokens", "tokens/s", "peak state: "] {
        assert!(report.contains(part), "{report}");
    }
}

#[test]
fn bad_arguments_of_generate_are_named() {
    for (arguments, part) in [
        (&["--temperature", "-1"][..], "--temperature is -1, must be 0 or a positive number"),
        (&["--temperature", "nan"], "--temperature is NaN"),
        (&["--top-p", "0"], "--top-p is 0, must be more than 0 and at most 1"),
        (&["--top-p", "1.5"], "--top-p is 1.5"),
        (&["--min-p", "2"], "--min-p is 2, must be from 0 to 1"),
        (&["--top-k", "0"], "--top-k is 0, must be at least 1"),
        (&["--repeat-penalty", "0"], "--repeat-penalty is 0, must be from 0.001 to 1000"),
        (&["--repeat-penalty", "1e-38"], "--repeat-penalty is "),
        (&["--repeat-penalty", "nan"], "--repeat-penalty is NaN"),
        (&["-n", "0"], "--max-new-tokens is 0, must be at least 1"),
        (&["--prompt", ""], "--prompt is empty"),
        (&["--revision", "main"], "--revision belongs to --model-id"),
        (&["--mode", "sideways"], "fused-chunk"),
    ] {
        let message = fail(&mut generate(arguments));
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
}

#[test]
fn a_folder_that_is_no_model_is_named_with_what_is_wrong() {
    let broken = FOLDER.path().join("broken");
    let message = |folder: &Path| fail(example("generate").arg("--model").arg(folder));
    assert!(message(Path::new("nowhere")).contains("no model folder at nowhere"));
    std::fs::create_dir_all(&broken).unwrap();
    assert!(message(&broken).contains("no tokenizer at"));
    std::fs::copy(model().join("tokenizer.json"), broken.join("tokenizer.json")).unwrap();
    assert!(message(&broken).contains("config.json"));
    std::fs::write(broken.join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    let unsupported = message(&broken);
    for part in ["gpt2", "gla", "linear_attn", "retnet", "mamba2", "kda"] {
        assert!(unsupported.contains(part), "{unsupported}");
    }
    std::fs::write(broken.join("tokenizer.json"), "{").unwrap();
    assert!(message(&broken).contains("cannot read the tokenizer"));
}

#[test]
fn an_error_is_one_line_wherever_backtraces_are_asked_for() {
    let folder = FOLDER.path().join("one-line");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(model().join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"model_type": "gla", "num_heads": 0}"#).unwrap();
    for name in ["generate", "logits"] {
        let mut command = example(name);
        if name == "logits" {
            command.args(["--tokens", "1", "--output", "unwritten"]);
        }
        let message = fail(command.arg("--model").arg(&folder).env("RUST_BACKTRACE", "1"));
        assert!(message.contains("`num_heads` is 0") && message.trim_end().lines().count() == 1, "{message}");
    }
}

fn logits(model: &Path, tokens: &str, more: &[&str], output: &Path) -> Command {
    let mut command = example("logits");
    command.arg("--model").arg(model).args(["--tokens", tokens]).args(more).arg("--output").arg(output);
    command
}

/// `||x - reference|| / ||reference||`
fn error(x: &Tensor, reference: &Tensor) -> f32 {
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap();
    norm(&(x - reference).unwrap()) / norm(reference)
}

#[test]
fn logits_are_those_of_the_original_implementation_however_they_are_split() {
    let folders = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models")).unwrap();
    let names: Vec<_> = folders.map(|folder| folder.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.len() > 10);
    for name in &names {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name);
        let golden = candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu).unwrap();
        let ids = golden["input_ids"].flatten_all().unwrap().to_dtype(candle_core::DType::U32).unwrap();
        let ids: Vec<String> = ids.to_vec1::<u32>().unwrap().iter().map(u32::to_string).collect();
        let output = FOLDER.path().join(format!("{name}.safetensors"));
        for split in [&[][..], &["--split", "67"], &["--split", "0"]] {
            succeed(&mut logits(&folder, &ids.join(","), split, &output));
            let written = candle_core::safetensors::load(&output, &Device::Cpu).unwrap();
            let error = error(&written["logits"], &golden["logits"].squeeze(0).unwrap());
            assert!(error < 1e-4, "{name} {split:?}: {error}");
        }
    }
}

/// What the shell or a program that waits for the logits has put there.
#[cfg(unix)]
#[test]
fn logits_are_written_where_a_link_leads_and_into_a_pipe() {
    let path = |name: &str| FOLDER.path().join(name);
    let (file, there, nowhere, pipe) =
        (path("plain.safetensors"), path("link"), path("dangling"), path("pipe"));
    let write = |output: &Path| succeed(&mut logits(&model(), "1,2", &[], output));
    write(&file);
    let expected = std::fs::read(&file).unwrap();
    std::fs::write(path("old"), "old").unwrap();
    for (link, target) in [(&there, "old"), (&nowhere, "new")] {
        std::os::unix::fs::symlink(target, link).unwrap();
        write(link);
        assert!(link.is_symlink() && std::fs::read(path(target)).unwrap() == expected, "{target}");
    }
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    write(&pipe);
    assert!(reader.join().unwrap() == expected);
    assert!(!pipe.is_file() && pipe.exists());
}

#[test]
fn bad_arguments_of_logits_are_named() {
    let output = FOLDER.path().join("logits.safetensors");
    for (tokens, more, part) in [
        ("1,2,3", &["--split", "4"][..], "--split is 4, must be at most the number of tokens, 3"),
        ("1,999999", &[], "--tokens has 999999, must be less than the vocabulary size"),
        ("1,x", &[], "invalid digit"),
        ("", &[], "--tokens"),
    ] {
        let message = fail(&mut logits(&model(), tokens, more, &output));
        assert!(message.contains(part), "{tokens}: {message}");
    }
    let nowhere = FOLDER.path().join("no/such/folder/logits.safetensors");
    let message = fail(&mut logits(&model(), "1", &[], &nowhere));
    assert!(message.contains("cannot write --output"), "{message}");
    assert!(fail(&mut logits(Path::new("nowhere"), "1", &[], &output)).contains("nowhere"));
}

/// The tiny model with a template and what a chat model's folder has besides.
static CHAT: LazyLock<PathBuf> = LazyLock::new(|| chat_folder("chat"));

fn chat_folder(name: &str) -> PathBuf {
    let folder = FOLDER.path().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model().join(file), folder.join(file)).unwrap();
    }
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}[assistant]{% if enable_thinking %}<think>{% endif %}{% endif %}";
    let config = serde_json::json!({"chat_template": template});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("generation_config.json"), r#"{"do_sample": false}"#).unwrap();
    folder
}

/// What a session says to these lines, and its report.
fn chat(lines: &str, arguments: &[&str]) -> (String, String) {
    let mut command = example("generate");
    command.arg("--model").arg(&*CHAT).arg("--chat").args(arguments);
    if !arguments.contains(&"-n") {
        command.args(["-n", "12"]);
    }
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let report = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{report}");
    (String::from_utf8(output.stdout).unwrap(), report)
}

#[test]
fn a_chat_reads_lines_until_it_is_told_to_stop() {
    let (one, report) = chat("Hello\n", &[]);
    assert!(one.ends_with('\n') && one.len() > 1 && report.contains("decode: "), "{one:?} {report}");
    // By its file the model does not sample: what was said first is answered as before, whatever comes after it.
    let (more, _) =
        chat("Hello\n\nAnd now?\r\nOne more ❄\n  \nThe last\n/exit\nNot this\n", &["--seed", "9"]);
    assert!(more.starts_with(&one) && more.len() > one.len(), "{more:?}");
    assert_eq!(chat("Hello\n\nAnd now?\nOne more ❄\nThe last", &[]).0, more);
    let prompt = |report: &str| report.split(" tokens").next().unwrap().to_owned();
    assert_ne!(prompt(&chat("Hello\n", &["--system", "You are a bear."]).1), prompt(&report));
    assert_eq!(chat("Hello\n/reset\nHello\n", &[]).0, one.repeat(2));
    assert_eq!(chat("", &[]).0, "");
}

#[test]
fn an_answer_that_is_cut_off_is_said_to_be() {
    assert!(chat("Hello\n", &["-n", "1"]).1.contains("cut off by --max-new-tokens"));
}

#[test]
fn thoughts_are_shown_unless_they_are_hidden() {
    let (plain, _) = chat("Hello\n", &[]);
    assert_eq!(chat("Hello\n", &["--thinking", "off"]).0, plain);
    // The tiny model has never seen a mark and so goes on thinking.
    assert!(chat("Hello\n", &["--thinking", "on"]).0.starts_with("<think>\n"));
    assert_eq!(chat("Hello\n", &["--thinking", "on", "--hide-thinking"]).0, "\n");
}

#[test]
fn a_chat_needs_a_template_and_its_options_a_chat() {
    let message = fail(&mut generate(&["--chat"]));
    assert!(message.contains("has no chat template"), "{message}");
    for arguments in
        [&["--system", "x"][..], &["--hide-thinking"], &["--thinking", "on"], &["--chat", "--prompt", "x"]]
    {
        let message = fail(&mut generate(arguments));
        assert!(message.contains("--chat"), "{arguments:?}: {message}");
    }
}

#[test]
fn broken_files_of_a_chat_are_named() {
    let folder = chat_folder("broken-chat");
    for (file, text, part) in [
        ("generation_config.json", r#"{"top_k": "all"}"#, r#"top_k is "all", must be"#),
        ("tokenizer_config.json", r#"{"chat_template": "{% for %}"}"#, "chat template cannot be read"),
        ("tokenizer_config.json", r#"{"bos_token": 1}"#, "bos_token is 1, must be"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not a JSON object"),
    ] {
        std::fs::write(folder.join(file), text).unwrap();
        let message = fail(example("generate").arg("--model").arg(&folder).arg("--chat"));
        assert!(message.contains(part), "{file}: {message}");
    }
}

#[test]
fn quantized_models_write_too() {
    for format in ["q8_0", "q4_k"] {
        let text = succeed(&mut generate(&["--temperature", "0", "-n", "20", "--quantize", format]));
        assert!(text.starts_with("Once upon a time") && text.len() > 60, "{format}: {text}");
    }
    let message = fail(&mut generate(&["--quantize", "q3"]));
    assert!(message.contains("q8_0") && message.contains("q4_k"), "{message}");
}
