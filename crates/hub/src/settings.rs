//! What the environment says: where the cache is, which hub is asked, and with which token. The variables are those of Python's
//! `huggingface_hub`.

use std::{
    env,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use ternion_core::{ErrorKind, Result, file::read_capped};

/// No file with a token is larger than this.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Where models come from and where they are kept.
#[derive(Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The folder of the cache. `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// The address of the hub: `HF_ENDPOINT`, else `https://huggingface.co`.
    pub endpoint: String,
    /// The token for gated and private repositories: `HF_TOKEN`, else the file that `hf auth login` writes
    /// (`HF_TOKEN_PATH`, else `$HF_HOME/token`).
    pub token: Option<String>,
    /// Whether only the cache is used: `HF_HUB_OFFLINE`.
    pub offline: bool,
}

impl Settings {
    /// The settings of the process's environment.
    ///
    /// # Errors
    /// Where the file with the token exists and cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|key| env::var_os(key))
    }

    fn from_variables(get: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        // Empty variables are as good as none.
        let var = |key: &str| get(key).filter(|value| !value.is_empty());
        let text = |key: &str| var(key).and_then(|value| value.into_string().ok());
        let path = |key: &str| var(key).map(|value| expanded(Path::new(&value), &var));
        let home = path("HF_HOME").unwrap_or_else(|| {
            let base = path("XDG_CACHE_HOME").unwrap_or_else(|| expanded(Path::new("~/.cache"), &var));
            base.join("huggingface")
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        let token = match text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")) {
            Some(token) => Some(token),
            None => token_in(&path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")))?,
        };
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self {
            cache: cache.unwrap_or_else(|| home.join("hub")),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            offline: offline.is_some_and(|value| is_true(&value)),
        })
    }
}

impl fmt::Debug for Settings {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish()
    }
}

fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// The path with a leading `~` as the home folder of the user.
fn expanded(path: &Path, var: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let home = || var(if cfg!(windows) { "USERPROFILE" } else { "HOME" });
    match (path.strip_prefix("~"), home()) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => path.to_owned(),
    }
}

fn token_in(file: &Path) -> Result<Option<String>> {
    match read_capped(file, MAX_TOKEN_BYTES, ErrorKind::InvalidConfig) {
        Ok(bytes) => Ok(String::from_utf8(bytes).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.with_operation("hub")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Settings {
        let get = |key: &str| {
            let mut all = [("HOME", "/home/u"), ("USERPROFILE", "/home/u")].iter().chain(variables).rev();
            all.find(|(k, _)| *k == key).map(|(_, value)| OsString::from(value))
        };
        Settings::from_variables(&get).unwrap()
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| read(variables).cache;
        assert_eq!(cache(&[]), Path::new("/home/u/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")]), Path::new("/home/u/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "")]), Path::new("/hf/hub"));
    }

    #[test]
    fn a_token_comes_from_the_environment_or_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(read(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        let both = read(&[("HF_HOME", home), ("HF_TOKEN", " hf_env ")]);
        assert_eq!(both.token.as_deref(), Some("hf_env"));
        assert!(!format!("{both:?}").contains("hf_env"));
        assert_eq!(read(&[("HF_TOKEN_PATH", "/none")]).token, None);
        assert!(read(&[("HF_HUB_OFFLINE", "yes")]).offline && !read(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert_eq!(read(&[("HF_ENDPOINT", "http://h:1/")]).endpoint, "http://h:1");
    }
}
