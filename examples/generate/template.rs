//! The chat template of a model folder: how a conversation is written for the model.

use anyhow::{Context, Result, anyhow, bail};
use minijinja::{
    Environment, Error, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, Value as Jinja},
};
use serde::Serialize;
use serde_json::{
    Map, Value, json,
    ser::{Formatter, PrettyFormatter},
};
use std::{io, path::Path};

const CONFIG: &str = "tokenizer_config.json";
const FILE: &str = "chat_template.jinja";
const NAME: &str = "chat template";

/// What somebody said.
#[derive(Debug, Clone, Serialize)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
}

impl Message {
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A template in an environment like the one transformers has for it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens, and what the user asks of the template.
    variables: Map<String, Value>,
    end_token: Option<String>,
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, or the field `chat_template` of `tokenizer_config.json`, where it is
    /// a string or a list of templates by name.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join(CONFIG))?;
        let source = match std::fs::read_to_string(folder.join(FILE)) {
            Ok(source) => source,
            Err(_) => template_of(&config).with_context(|| {
                format!(
                    "{} has no chat template: neither {FILE} nor the field chat_template of {CONFIG}",
                    folder.display()
                )
            })?,
        };
        Self::new(source, special_tokens(&config))
    }

    fn new(source: String, special_tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", now);
        environment.add_template_owned(NAME, source).map_err(|e| failure("cannot be read", &e))?;
        let end_token = special_tokens.get("eos_token").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { environment, variables: special_tokens, end_token })
    }

    /// Says something to the template, as `enable_thinking`.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// The token that the tokenizer's configuration says ends a text.
    pub fn end_token(&self) -> Option<&str> {
        self.end_token.as_deref()
    }

    /// The text of a conversation, with the beginning of an answer behind it if asked for.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let mut variables = self.variables.clone();
        variables.insert("messages".to_owned(), json!(messages));
        variables.insert("add_generation_prompt".to_owned(), answer.into());
        for name in ["tools", "documents"] {
            variables.insert(name.to_owned(), Value::Null);
        }
        let template = self.environment.get_template(NAME)?;
        template.render(Serde(variables)).map_err(|e| failure("refuses the conversation", &e))
    }
}

fn failure(what: &str, error: &Error) -> anyhow::Error {
    let at = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    anyhow!("the model's chat template {what}: {}{at}", error.detail().unwrap_or("not valid"))
}

/// A file that may be missing, but not broken.
pub fn read_json(path: &Path) -> Result<Value> {
    match std::fs::read_to_string(path) {
        Err(_) => Ok(Value::Null),
        Ok(text) => {
            serde_json::from_str(&text).with_context(|| format!("{}: not valid JSON", path.display()))
        }
    }
}

fn template_of(config: &Value) -> Result<String> {
    match &config["chat_template"] {
        Value::String(source) => Ok(source.clone()),
        Value::Array(named) => {
            let default =
                named.iter().find(|template| template["name"] == "default").or_else(|| named.first());
            let source = default.and_then(|template| template["template"].as_str());
            source.map(str::to_owned).context("the list chat_template has no template named default")
        }
        Value::Null => bail!("chat_template is missing"),
        other => bail!("chat_template is {other}, it must be a string or a list of templates"),
    }
}

/// `bos_token` and the like, each a string or an object around it.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let fields = config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
    let content = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(Value::from);
    fields.filter_map(|(name, value)| Some((name.clone(), content(value)?))).collect()
}

/// As Python writes it: with spaces behind commas and colons, and every character as it is.
fn to_json(value: &Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = kwargs.get("indent")?;
    // Others ask for what is so anyway.
    let _: (Option<bool>, Option<bool>) = (kwargs.get("ensure_ascii")?, kwargs.get("sort_keys")?);
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

    fn rendered(source: &str, messages: &[Message]) -> Result<String> {
        let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 7});
        ChatTemplate::new(source.to_owned(), special_tokens(&tokens))?.render(messages, true)
    }

    /// Each is what transformers 5 makes of the same template.
    #[test]
    fn templates_mean_what_they_mean_in_python() -> Result<()> {
        let messages = [Message::new("user", " Hi <b>\"you\"</b> "), Message::new("assistant", "Yo\\u003c")];
        for (source, text) in [
            ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s></s>"),
            ("{% for m in messages %}\n  {% if m.role == 'user' %}\nU\n  {% endif %}\n{% endfor %}\n", "U\n"),
            (
                "{% for m in messages %}{{ m.content.strip() | upper }}{% break %}{% endfor %}",
                "HI <B>\"YOU\"</B>",
            ),
            ("{{ messages[1] | tojson }}", r#"{"role": "assistant", "content": "Yo\\u003c"}"#),
            ("{{ messages[0].content | tojson(indent=2) }}", r#"" Hi <b>\"you\"</b> ""#),
            ("{{ [1, {'a': none}] | tojson(indent=1) }}", "[\n 1,\n {\n  \"a\": null\n }\n]"),
            ("{{ messages[0]['content'].split('<b>')[-1].startswith('\"you') }}", "True"),
            ("{{ messages[::-1][0].content }}{% if tools %}tools{% endif %}", "Yo\\u003c"),
            (
                "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{% if add_generation_prompt and enable_thinking is not defined %}go{% endif %}", "go"),
            ("{{ strftime_now('%%') }}", "%"),
        ] {
            let found = rendered(source, &messages)?;
            assert_eq!(found.replace("true", "True"), text, "{source}");
        }
        Ok(())
    }

    #[test]
    fn what_a_template_refuses_is_said() {
        let message = |source: &str| format!("{:#}", rendered(source, &[]).unwrap_err());
        let refusal = message("{{ raise_exception('Roles must alternate') }}");
        assert!(refusal.contains("Roles must alternate") && refusal.contains("line 1"), "{refusal}");
        assert!(message("{% if %}").contains("cannot be read"));
    }

    #[test]
    fn a_template_is_a_string_a_list_or_a_file() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let error = ChatTemplate::load(folder.path()).err().context("there is none")?;
        assert!(format!("{error:#}").contains("has no chat template"), "{error:#}");
        let hello = |text: &str| -> Result<()> {
            assert_eq!(ChatTemplate::load(folder.path())?.render(&[], false)?, text);
            Ok(())
        };
        let named = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]);
        for (value, text) in [(json!("string"), "string"), (named, "list")] {
            std::fs::write(folder.path().join(CONFIG), json!({"chat_template": value}).to_string())?;
            hello(text)?;
        }
        std::fs::write(folder.path().join(FILE), "file")?;
        hello("file")
    }
}
