//! The Hub's cache without a network.

use crate::support::*;
use candle_core::Result;
use candle_linear_attn::models::Model;
use candle_linear_attn::models::hub::Hub;
use std::fs;
use std::path::{Path, PathBuf};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Nothing listens there.
fn offline(cache: &Path) -> Hub {
    Hub::default().with_cache_dir(cache).with_endpoint("http://127.0.0.1:9").with_progress(false)
}

/// A cache as the Hub's tools leave it, with one model in it.
fn fill(cache: &Path, files: &[&str]) -> Result<PathBuf> {
    let root = cache.join("models--someone--tiny-gla");
    let snapshot = root.join("snapshots").join(COMMIT);
    fs::create_dir_all(root.join("refs"))?;
    fs::create_dir_all(&snapshot)?;
    fs::write(root.join("refs/main"), COMMIT)?;
    for file in files {
        match *file {
            "tokenizer.json" => fs::write(snapshot.join(file), "{}")?,
            _ => fs::copy(golden_folder("gla").join(file), snapshot.join(file)).map(drop)?,
        }
    }
    Ok(snapshot)
}

#[test]
fn a_cached_model_needs_no_network() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let snapshot = fill(cache.path(), &["config.json", "tokenizer.json", "model.safetensors"])?;
    for revision in [None, Some("main"), Some(COMMIT)] {
        let folder = offline(cache.path()).fetch("someone/tiny-gla", revision)?;
        assert_eq!(folder, snapshot);
        Model::load(folder, None, &CPU)?;
    }
    Ok(())
}

#[test]
fn a_cached_model_without_a_tokenizer_is_better_than_none() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let snapshot = fill(cache.path(), &["config.json", "model.safetensors"])?;
    assert_eq!(offline(cache.path()).fetch("someone/tiny-gla", None)?, snapshot);
    Ok(())
}

#[test]
fn without_a_network_the_message_says_what_to_do() -> Result<()> {
    let cache = tempfile::tempdir()?;
    fill(cache.path(), &["config.json"])?;
    for (id, revision) in
        [("someone/tiny-gla", None), ("someone/else", None), ("someone/tiny-gla", Some("v2"))]
    {
        let message = message(offline(cache.path()).fetch(id, revision));
        assert_says(&message, &[id, "no connection", "check the network", "give its folder"]);
    }
    Ok(())
}

#[test]
fn ids_and_revisions_stay_in_the_cache() {
    let cache = tempfile::tempdir().expect("a folder");
    for id in ["", "../../etc", "a/../b", "a//b", "/a", "a b", "a\\b", "a?b=c"] {
        assert_says(&message(offline(cache.path()).fetch(id, None)), &["model id is", "letters, digits"]);
    }
    assert_says(
        &message(offline(cache.path()).fetch("a/b", Some("../x"))),
        &["revision is", "letters, digits"],
    );
}
