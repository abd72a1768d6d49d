//! Checkpoints from the Hugging Face Hub.

use crate::models::checkpoint::{INDEX, SINGLE, read_index};
use candle_core::{Result, bail};
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Taken along where a repository has them.
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "generation_config.json"];

/// Downloads a model from the Hub, or finds it in the local cache; see [`Hub`] for where these are.
///
/// `id` is `owner/name`, `revision` a branch, tag or commit (`None` means `main`). Returns a folder for
/// [`Model::load`](crate::models::Model::load). Once a model is in the cache, no network is needed or used.
///
/// # Errors
/// No network, no such repository or revision, a repository without a file that is needed.
pub fn fetch(id: &str, revision: Option<&str>) -> Result<PathBuf> {
    Hub::default().fetch(id, revision)
}

/// Where models come from and where they are kept. By default: what the environment says (`HF_HOME` for the cache,
/// `HF_ENDPOINT` for the server), or else `~/.cache/huggingface` and `https://huggingface.co`, with progress bars. The
/// cache is shared with the Python tools.
#[derive(Debug, Clone)]
pub struct Hub {
    cache_dir: Option<PathBuf>,
    endpoint: Option<String>,
    progress: bool,
}

impl Default for Hub {
    fn default() -> Self {
        Self { cache_dir: None, endpoint: None, progress: true }
    }
}

impl Hub {
    /// The folder that holds `models--owner--name`, in place of `$HF_HOME/hub`.
    pub fn with_cache_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(folder.into());
        self
    }

    /// The server, in place of `https://huggingface.co`.
    pub fn with_endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoint = Some(url.into());
        self
    }

    /// Whether a bar on standard error shows how far a download is.
    pub fn with_progress(mut self, progress: bool) -> Self {
        self.progress = progress;
        self
    }

    /// [`fetch`] from here.
    pub fn fetch(&self, id: &str, revision: Option<&str>) -> Result<PathBuf> {
        let revision = revision.unwrap_or("main");
        check_name("model id", id)?;
        check_name("revision", revision)?;
        let cached = self.cached(id, revision)?;
        if let Some(folder) = cached.as_ref().filter(|folder| folder.join(TOKENIZER).is_file()) {
            return Ok(folder.clone());
        }
        match (self.download(id, revision), cached) {
            // Only the tokenizer is not there, and whoever asked may not need it.
            (Err(_), Some(folder)) => Ok(folder),
            (result, _) => result,
        }
    }

    /// The folder of a model whose configuration and weights are all in the cache.
    fn cached(&self, id: &str, revision: &str) -> Result<Option<PathBuf>> {
        let repo = repo(id, revision);
        let root = self.cache_path()?.join(repo.folder_name());
        // The Python tools record branches and tags; a commit is the name of its own folder.
        let commit = std::fs::read_to_string(root.join("refs").join(revision));
        let commit = commit.map_or(revision.to_string(), |commit| commit.trim().to_string());
        let folder = root.join("snapshots").join(commit);
        Ok(is_complete(&folder).then_some(folder))
    }

    fn cache_path(&self) -> Result<PathBuf> {
        if let Some(folder) = &self.cache_dir {
            return Ok(folder.clone());
        }
        // hf-hub would panic without a home to put its cache in.
        if std::env::var_os("HF_HOME").is_none() && std::env::home_dir().is_none() {
            bail!("there is no home folder to keep models in: set HF_HOME to a folder");
        }
        Ok(Cache::from_env().path().clone())
    }

    fn download(&self, id: &str, revision: &str) -> Result<PathBuf> {
        let mut builder = ApiBuilder::from_cache(Cache::new(self.cache_path()?)).with_progress(self.progress);
        if let Some(endpoint) = self.endpoint.clone().or_else(|| std::env::var("HF_ENDPOINT").ok()) {
            builder = builder.with_endpoint(endpoint);
        }
        let api = match builder.build() {
            Ok(api) => api,
            Err(error) => bail!("no connection to the Hugging Face Hub: {error}"),
        };
        let repo = api.repo(repo(id, revision));
        let files = list(&repo, id, revision)?;
        let get = |name: &str| match repo.get(name) {
            Ok(path) => Ok(path),
            Err(error) => bail!(
                "{id}: {name} could not be downloaded ({error}); what has arrived is kept, so try again, or download \
                 the repository by other means and give its folder"
            ),
        };
        let has = |name: &str| files.contains(name);
        if !has(CONFIG) {
            bail!("{id}: has no {CONFIG} at revision {revision}, so it is not a model that can be loaded");
        }
        // The weights last: a cache that holds them holds the rest.
        let config = get(CONFIG)?;
        for name in [TOKENIZER].into_iter().chain(OPTIONAL).filter(|name| has(name)) {
            get(name)?;
        }
        if has(SINGLE) {
            get(SINGLE)?;
        } else if has(INDEX) {
            let shards: BTreeSet<String> = read_index(&get(INDEX)?)?.into_values().collect();
            shards.iter().try_for_each(|shard| get(shard).map(drop))?;
        } else {
            bail!(
                "{id}: has neither {SINGLE} nor {INDEX} at revision {revision}; other formats are not supported"
            );
        }
        Ok(config.parent().map(Path::to_path_buf).unwrap_or_default())
    }
}

fn repo(id: &str, revision: &str) -> Repo {
    Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string())
}

/// These become parts of paths and addresses.
fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part != "." && part != ".." && part.chars().all(allowed)
    };
    if !name.split('/').all(plain) {
        bail!("{what} is \"{name}\", it must be letters, digits, '-', '_' and '.', with '/' between parts");
    }
    Ok(())
}

fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    if !has(CONFIG) {
        return false;
    }
    has(SINGLE)
        || read_index(&folder.join(INDEX)).is_ok_and(|weight_map| weight_map.values().all(|file| has(file)))
}

/// The files of a repository. Asked for first, because it is where a wrong name shows.
fn list(repo: &ApiRepo, id: &str, revision: &str) -> Result<BTreeSet<String>> {
    let request = repo.info_request().config().http_status_as_error(false).build();
    let mut response = match request.call() {
        Ok(response) => response,
        Err(error) => bail!(
            "{id}: not in the local cache, and no connection to the Hugging Face Hub ({error}); check the network, or \
             download the repository elsewhere and give its folder"
        ),
    };
    match response.status().as_u16() {
        200 => {}
        // The Hub does not tell strangers which repositories exist.
        401 | 403 => bail!(
            "{id}: no such repository on the Hub, or one that needs a token (`hf auth login` stores one)"
        ),
        404 => bail!("{id}: no such repository on the Hub, or no revision {revision} in it"),
        status => bail!("{id}: the Hub answered with status {status}; try again later"),
    }
    match response.body_mut().read_json::<RepoInfo>() {
        Ok(info) => Ok(info.siblings.into_iter().map(|file| file.rfilename).collect()),
        Err(error) => bail!("{id}: the Hub's list of files cannot be read: {error}"),
    }
}
