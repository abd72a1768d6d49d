//! The chat template of a model folder: how a conversation is written for the model.

use crate::{
    fields::{Fields, read_if_there},
    thinking,
};
use anyhow::{Context, Result, anyhow, bail};
use minijinja::{
    Environment, Error, ErrorKind, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, Value as Jinja},
};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};
use std::{collections::BTreeMap, io, path::Path};

/// Where a template may be, in the order in which they are looked for.
const FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";
const PROCESSOR: &str = "chat_template.json";
const FIELD: &str = "chat_template";
const NAME: &str = "chat template";

/// What somebody said.
#[derive(Debug, Clone, Serialize)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
    /// What was thought before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

impl Message {
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), reasoning_content: None }
    }

    /// What a model wrote behind a prompt.
    pub fn answer(prompt: &str, text: &str) -> Self {
        let (thought, said) = thinking::split(prompt, text);
        Self { reasoning_content: thought.map(str::to_owned), ..Self::new("assistant", said) }
    }
}

/// A template in an environment like the one transformers has for it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens, and what the user asks of the template.
    variables: BTreeMap<String, Jinja>,
    end_token: Option<String>,
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, else the field `chat_template` of `tokenizer_config.json` or of
    /// `chat_template.json`, a string or a list of which the one named `default` is taken.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = Fields::read(folder.join(CONFIG))?;
        let tokens = special_tokens(&config)?;
        let source = match read_if_there(&folder.join(FILE))? {
            Some(source) => Some(source),
            None => match template_of(&config)? {
                Some(source) => Some(source),
                None => template_of(&Fields::read(folder.join(PROCESSOR))?)?,
            },
        };
        let source = source.with_context(|| {
            format!(
                "{} has no chat template: neither {FILE} nor the field {FIELD} of {CONFIG} or {PROCESSOR}",
                folder.display()
            )
        })?;
        Self::new(&source, tokens)
    }

    fn new(source: &str, special_tokens: BTreeMap<String, Jinja>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // minijinja goes over none as if it were empty.
        environment.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", now);
        environment
            .add_template_owned(NAME, without_generation(source))
            .map_err(|e| failure("cannot be read", &e))?;
        let end_token = special_tokens.get("eos_token").and_then(|token| Some(token.as_str()?.to_owned()));
        Ok(Self { environment, variables: special_tokens, end_token })
    }

    /// Says something to the template, as `enable_thinking`.
    pub fn set(&mut self, name: &str, value: impl Into<Jinja>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// The token that the tokenizer's configuration says ends a text.
    pub fn end_token(&self) -> Option<&str> {
        self.end_token.as_deref()
    }

    /// The text of a conversation, with the beginning of an answer behind it if asked for.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let variables = context! {
            messages => Jinja::from(Serde(messages)),
            add_generation_prompt => answer,
            tools => (),
            documents => (),
            ..Jinja::from(self.variables.clone())
        };
        let template = self.environment.get_template(NAME)?;
        template.render(variables).map_err(|e| failure("refuses the conversation", &e))
    }
}

fn failure(what: &str, error: &Error) -> anyhow::Error {
    anyhow!("the model's chat template {what}: {error}")
}

/// transformers marks with `{% generation %}` what a model is trained to write. Here that is a block of no effect.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let end = rest[start..].find("%}").map_or(rest.len(), |length| start + length + 2);
        let (text, tag) = (&rest[..start], &rest[start..end]);
        out += text;
        out += &match tag.trim_matches(|c: char| "{%-+}".contains(c) || c.is_whitespace()) {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        rest = &rest[end..];
    }
    out + rest
}

/// How a file has its template.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    One(String),
    Many(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

fn template_of(file: &Fields) -> Result<Option<String>> {
    match file.get(FIELD, "a template or a list of templates, each with name and template")? {
        None => Ok(None),
        Some(Stored::One(source)) => Ok(Some(source)),
        Some(Stored::Many(named)) => {
            // The others are for tools and documents, which are not given here.
            match named.iter().find(|one| one.name == "default") {
                Some(default) => Ok(Some(default.template.clone())),
                None => {
                    let names: Vec<_> = named.into_iter().map(|one| one.name).collect();
                    bail!("{} names {names:?}, one of them must be \"default\"", file.name_of(FIELD))
                }
            }
        }
    }
}

/// How a file has a special token.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

/// `bos_token` and the like.
fn special_tokens(config: &Fields) -> Result<BTreeMap<String, Jinja>> {
    let mut tokens = BTreeMap::new();
    // `add_bos_token` says whether, not which.
    for name in config.names().filter(|name| name.ends_with("_token") && !name.starts_with("add_")) {
        let token = config.get(name, "a token or an object with its content")?;
        if let Some(Token::Text(text) | Token::Added { content: text }) = token {
            tokens.insert(name.clone(), text.into());
        }
    }
    Ok(tokens)
}

/// Every line of every object may begin with so many spaces, and as many again for each object around it.
const MOST_INDENT: usize = 256;

/// As Python writes it: with spaces behind commas and colons, and every character as it is.
fn to_json(value: &Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = kwargs.get("indent")?;
    if let Some(indent) = indent.filter(|indent| *indent > MOST_INDENT) {
        let message = format!("tojson's indent is {indent}, it must be at most {MOST_INDENT}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    for name in ["ensure_ascii", "sort_keys"] {
        if kwargs.get::<Option<bool>>(name)? == Some(true) {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson has no {name} here")));
        }
    }
    kwargs.assert_all_used()?;
    let mut out = vec![];
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent];
            let formatter = PrettyFormatter::with_indent(&spaces);
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?;
        }
    }
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// One line with a space behind every comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// The time by a format of C's `strftime`.
fn now(format: String) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("{format:?} is no format of a time"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(source: &str, messages: &[Message]) -> Result<String> {
        let folder = tempfile::tempdir()?;
        let config = json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
            "add_bos_token": false, "model_max_length": 1e30, "chat_template": source,
        });
        std::fs::write(folder.path().join(CONFIG), config.to_string())?;
        ChatTemplate::load(folder.path())?.render(messages, true)
    }

    /// Each is what transformers 5 makes of the same template.
    #[test]
    fn templates_mean_what_they_mean_in_python() -> Result<()> {
        let messages = [Message::new("user", " Hi <b>\"you\"</b> "), Message::new("assistant", "Yö\\u003c")];
        for (source, text) in [
            ("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_bos_token }}", "<s></s>"),
            ("{% for m in messages %}\n  {% if m.role == 'user' %}\nU\n  {% endif %}\n{% endfor %}\n", "U\n"),
            (
                "{% for m in messages %}{{ m.content.strip() | upper }}{% break %}{% endfor %}",
                "HI <B>\"YOU\"</B>",
            ),
            ("{{ messages[1] | tojson }}", r#"{"role": "assistant", "content": "Yö\\u003c"}"#),
            ("{{ messages[0].content | tojson(indent=2, ensure_ascii=false) }}", r#"" Hi <b>\"you\"</b> ""#),
            ("{{ [1, {'a': none}] | tojson(indent=1) }}", "[\n 1,\n {\n  \"a\": null\n }\n]"),
            ("{{ 1 if messages[0]['content'].split('<b>')[-1].startswith('\"you') }}", "1"),
            ("{{ ' a '.lstrip() + 'b\n'.rstrip('\n') + 'Abc'.lower().replace('b', 'x') }}", "a baxc"),
            ("{{ messages[::-1][0].content }}{% if tools %}tools{% endif %}", "Yö\\u003c"),
            (
                "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{% macro greet(name) %}Hi {{ name }}{% endmacro %}{{ greet('Jo') }}", "Hi Jo"),
            ("{% if add_generation_prompt and enable_thinking is not defined %}go{% endif %}", "go"),
            ("{% if tools is none and documents is not iterable %}none{% endif %}", "none"),
            ("{{ strftime_now('%%') }}", "%"),
            ("a {% generation %}b{% endgeneration %} c", "a b c"),
            ("a {%- generation -%} b\n{%- endgeneration %}\nc", "abc"),
        ] {
            let found = rendered(source, &messages).with_context(|| source.to_owned())?;
            assert_eq!(found, text, "{source}");
        }
        Ok(())
    }

    #[test]
    fn what_a_template_refuses_is_said() {
        let message = |source: &str| format!("{:#}", rendered(source, &[]).unwrap_err());
        let refusal = message("\n{{ raise_exception('Roles must alternate') }}");
        assert!(refusal.contains("Roles must alternate (in chat template:2)"), "{refusal}");
        assert!(message("{% if %}").contains("cannot be read"));
        assert!(message("{{ messages[0].content }}").contains("refuses the conversation"));
        assert!(message("{{ 'a'.no_such_method() }}").contains("no_such_method"));
        assert!(message("{{ strftime_now('%Q') }}").contains("%Q"));
        assert!(message("{{ 'é' | tojson(ensure_ascii=true) }}").contains("ensure_ascii"));
        assert!(message("{{ [1] | tojson(indent=1000000000000) }}").contains("indent is 1000000000000"));
        assert!(message("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("recursion"));
    }

    #[test]
    fn a_template_may_be_in_three_files_as_a_string_or_a_list() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let load = || ChatTemplate::load(folder.path());
        let message = || format!("{:#}", load().err().unwrap());
        let write = |file: &str, text: String| std::fs::write(folder.path().join(file), text);
        let none = message();
        for file in [FILE, CONFIG, PROCESSOR] {
            assert!(none.contains("has no chat template") && none.contains(file), "{none}");
        }
        let named = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]);
        for (file, value, text) in
            [(PROCESSOR, json!("p"), "p"), (CONFIG, json!("c"), "c"), (CONFIG, named, "list")]
        {
            write(file, json!({"chat_template": value}).to_string())?;
            assert_eq!(load()?.render(&[], false)?, text);
        }
        write(CONFIG, r#"{"chat_template": [{"name": "rag", "template": ""}]}"#.to_owned())?;
        assert!(message().contains(r#"tokenizer_config.json: chat_template names ["rag"]"#), "{}", message());
        write(CONFIG, r#"{"chat_template": 5}"#.to_owned())?;
        assert!(message().contains("tokenizer_config.json: chat_template is 5, must be"), "{}", message());
        write(FILE, "file".to_owned())?;
        assert_eq!(load()?.render(&[], false)?, "file");
        write(CONFIG, r#"{"eos_token": 5}"#.to_owned())?;
        assert!(message().contains("tokenizer_config.json: eos_token is 5, must be"), "{}", message());
        write(CONFIG, "[]".to_owned())?;
        assert!(message().contains("tokenizer_config.json is not a JSON object"), "{}", message());
        Ok(())
    }
}
