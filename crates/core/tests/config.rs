//! Configuration files as other tools and other systems leave them: byte order marks, folders whose names are not UTF-8,
//! relative paths.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{ffi::OsString, path::Path};

use ternion_core::config::{Config, Format, ReloadMode, is_config_file};

const NO_ENVIRONMENT: [(OsString, OsString); 0] = [];

#[test]
fn a_byte_order_mark_is_skipped_in_every_format() {
    for (name, text) in [
        ("c.toml", "[models.m]\npath = \"/m\"\n"),
        ("c.yaml", "models:\n  m:\n    path: /m\n"),
        ("c.json", "{\"models\": {\"m\": {\"path\": \"/m\"}}}"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let plain = Config::from_str(text, Format::of_path(&path).unwrap()).unwrap();
        let marked = format!("\u{feff}{text}");
        std::fs::write(&path, &marked).unwrap();
        assert_eq!(Config::load_with_env(&path, NO_ENVIRONMENT).unwrap(), plain, "{name}");
        assert_eq!(Config::from_str(&marked, Format::of_path(&path).unwrap()).unwrap(), plain, "{name}");
        // Only one, and only at the beginning.
        let twice = Config::from_str(&format!("\u{feff}{marked}"), Format::of_path(&path).unwrap());
        assert!(twice.is_err() || name != "c.json", "{name}");
    }
}

#[test]
fn another_encoding_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let utf16 = "\u{feff}[models]".encode_utf16().flat_map(u16::to_le_bytes);
    std::fs::write(&path, utf16.collect::<Vec<_>>()).unwrap();
    let error = Config::load_with_env(&path, NO_ENVIRONMENT).unwrap_err().to_string();
    assert!(error.contains("UTF-16; save it as UTF-8"), "{error}");
}

#[test]
fn relative_paths_become_absolute_when_a_file_is_loaded() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let relative = Path::new(folder.path().file_name().unwrap());
    let file = relative.join("c.toml");
    std::fs::write(
        &file,
        "[models.beside]\npath = \"model\"\n[models.absolute]\npath = \"/model\"\n\
         [models.hub]\npath = \"hf://owner/name\"\n[models.none]\nbackend = \"echo\"\n",
    )
    .unwrap();
    let variables = [("TERNION_MODELS__OTHER__PATH".into(), "model".into())];
    let config = Config::load_with_env(&file, variables).unwrap();
    let path = |name: &str| config.models[name].path.clone();
    let here = std::env::current_dir().unwrap();
    assert_eq!(path("beside"), Some(here.join(relative).join("model")));
    assert_eq!(path("other"), Some(here.join("model")), "a variable is relative to the working directory");
    assert_eq!(path("absolute").as_deref(), Some(Path::new("/model")));
    assert_eq!(path("hub").as_deref(), Some(Path::new("hf://owner/name")));
    assert_eq!(path("none"), None);
}

#[cfg(unix)]
#[test]
fn paths_are_relative_to_folders_that_are_not_utf8_too() {
    use std::os::unix::ffi::OsStringExt;

    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join(OsString::from_vec(b"caf\xe9".to_vec()));
    std::fs::create_dir(&odd).unwrap();
    for (name, text) in [
        ("c.toml", "[models.m]\npath = \"model\"\n"),
        ("c.yaml", "models: {m: {path: model}}\n"),
        ("c.json", "{\"models\": {\"m\": {\"path\": \"model\"}}}"),
    ] {
        std::fs::write(odd.join(name), text).unwrap();
        let config = Config::load_with_env(odd.join(name), NO_ENVIRONMENT).unwrap();
        assert_eq!(config.models["m"].path, Some(odd.join("model")), "{name}");
    }
}

#[test]
fn names_of_the_first_edition_are_still_read() {
    let text = "reload.mode = 'after'\n[models.m]\nbackend = 'echo'\ncontext = 50\n";
    let config = Config::from_str(text, Format::Toml).unwrap();
    assert_eq!(config.models["m"].context_length, Some(50));
    assert_eq!(config.reload.mode, ReloadMode::UnloadThenLoad);
    let both = Config::from_str("[models.m]\ncontext = 5\ncontext_length = 6\n", Format::Toml).unwrap_err();
    assert!(both.to_string().contains("unknown key `models.m.context`"), "{both}");
}

#[test]
fn an_index_is_a_checkpoint_and_other_json_is_a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    for (name, expected) in [
        ("a.toml", true),
        ("a.JSON", true),
        ("a.yml", true),
        ("model.safetensors.index.json", false),
        ("model.safetensors", false),
    ] {
        let path = folder.path().join(name);
        assert!(!is_config_file(&path), "{name} does not exist");
        std::fs::write(&path, "").unwrap();
        assert_eq!(is_config_file(&path), expected, "{name}");
    }
    assert!(!is_config_file(folder.path()));
}

#[test]
fn a_prompt_cache_has_a_folder_and_a_size() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("c.toml");
    std::fs::write(
        &file,
        "[models.a]\nprompt_cache = { path = \"prompts\", max_size = \"2GB\" }\n[models.b]\nprompt_cache.path = \"/p\"\n",
    )
    .unwrap();
    let config = Config::load_with_env(&file, NO_ENVIRONMENT).unwrap();
    let cache = |name: &str| config.models[name].prompt_cache.clone().unwrap();
    assert_eq!(cache("a").path, folder.path().join("prompts"));
    assert_eq!((cache("a").max_size.0, cache("b").max_size.0), (2_000_000_000, 8_000_000_000));
    assert_eq!(cache("b").path, Path::new("/p"));
    for (text, words) in [
        ("max_size = 5", "missing field `path`"),
        ("path = 'x', size = 5", "unknown key `models.m.prompt_cache.size`"),
        ("path = ''", "models.m.prompt_cache.path: is empty"),
    ] {
        let text = format!("[models.m]\nprompt_cache = {{ {text} }}\n");
        let error = Config::from_str(&text, Format::Toml).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}
