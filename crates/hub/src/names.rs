//! Short names of models that are known to run.
//!
//! A short name stands for a file set that Ternion has been tried with. Where hashes of its files are recorded, a download by the
//! short name must match them: that protects against a changed repository and against a mirror that serves something else. For the
//! other files, and for the models without recorded hashes, the hub's own hash is all there is. A hash is recorded where public sources
//! that do not copy from each other have it: those of Falcon-E are not.

use ternion_core::{Error, Result};

use crate::Address;

/// A model with a short name.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct KnownModel {
    /// The short name.
    pub name: &'static str,
    /// Its address on the hub.
    pub address: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// Names of files and their recorded SHA-256, in hexadecimal.
    pub sha256: &'static [(&'static str, &'static str)],
}

impl KnownModel {
    /// All models with a short name.
    pub const ALL: &[Self] = &[
        Self {
            name: "bitnet-2b4t",
            address: "hf://microsoft/bitnet-b1.58-2B-4T",
            description: "BitNet b1.58 2B4T, packed safetensors",
            sha256: BITNET_2B4T,
        },
        Self {
            name: "bitnet-2b4t-gguf",
            address: "hf://microsoft/bitnet-b1.58-2B-4T-gguf",
            description: "BitNet b1.58 2B4T, GGUF in I2_S",
            sha256: &[(
                "ggml-model-i2_s.gguf",
                "4221b252fdd5fd25e15847adfeb5ee88886506ba50b8a34548374492884c2162",
            )],
        },
        known("falcon-e-1b", "hf://tiiuae/Falcon-E-1B-Instruct", "Falcon-E 1B Instruct, packed safetensors"),
        known("falcon-e-3b", "hf://tiiuae/Falcon-E-3B-Instruct", "Falcon-E 3B Instruct, packed safetensors"),
        Self {
            name: "bonsai-1.7b",
            address: "hf://prism-ml/Ternary-Bonsai-1.7B-gguf/Ternary-Bonsai-1.7B-Q2_0_g64.gguf",
            description: "Ternary Bonsai 1.7B, GGUF in Q2_0 with groups of 64",
            sha256: &[(
                "Ternary-Bonsai-1.7B-Q2_0_g64.gguf",
                "6d0ecb3d9055969b5cde332b6fdb60e67ed3599e9f73e56b977731e1467e5c91",
            )],
        },
        Self {
            name: "bonsai-4b",
            address: "hf://prism-ml/Ternary-Bonsai-4B-gguf/Ternary-Bonsai-4B-Q2_0_g64.gguf",
            description: "Ternary Bonsai 4B, GGUF in Q2_0 with groups of 64",
            sha256: &[(
                "Ternary-Bonsai-4B-Q2_0_g64.gguf",
                "9d968b04a3c9a794897bcc744c8072fb6a061c0e42efd03c989401ddf8baef0c",
            )],
        },
        Self {
            name: "bonsai-8b",
            address: "hf://prism-ml/Ternary-Bonsai-8B-gguf/Ternary-Bonsai-8B-Q2_0_g64.gguf",
            description: "Ternary Bonsai 8B, GGUF in Q2_0 with groups of 64",
            sha256: &[(
                "Ternary-Bonsai-8B-Q2_0_g64.gguf",
                "e17b298d84ee78797916ae5c2ecc8211469cc65cccfe3080cd9a9bb503fbc55e",
            )],
        },
    ];

    /// The model with this short name.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|model| model.name == name)
    }

    /// Its address.
    ///
    /// # Errors
    /// None for the models of [`ALL`](Self::ALL).
    pub fn address(&self) -> Result<Address> {
        self.address.parse()
    }

    /// Compares a file with the recorded hash, if there is one.
    pub(crate) fn check(&self, file: &str, found: &str) -> Result<()> {
        let Some((_, recorded)) = self.sha256.iter().find(|(name, _)| *name == file) else { return Ok(()) };
        if recorded.eq_ignore_ascii_case(found) {
            return Ok(());
        }
        Err(Error::invalid_model(format!(
            "the file is not the one that is recorded for `{}` (SHA-256 {found}, recorded {recorded}); name the model as {} to \
             use it nevertheless",
            self.name, self.address
        ))
        .with("file", file))
    }
}

const fn known(name: &'static str, address: &'static str, description: &'static str) -> KnownModel {
    KnownModel { name, address, description, sha256: &[] }
}

const BITNET_2B4T: &[(&str, &str)] = &[
    ("config.json", "2b43e80788972e6d53967b01ac3609d7df23cf0aabb0c866e51be694a59c1149"),
    // The packed weights.
    ("model.safetensors", "8143ae115ed6babe5e5ada8fb8c5b769d8f417802b2db042ad98b4f7ed73975b"),
    ("generation_config.json", "af34a37cd006fd230106fcefc6bfdc1f775503aee05a80c174ccc5c6594f7054"),
    ("special_tokens_map.json", "462d91939dbc37178aa5a3eae7068d1990ccc92e09f288cc71f42cdf139d69cc"),
    ("tokenizer.json", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    ("tokenizer_config.json", "d27b698683435b0b0dd544a591a30196b2b63f5fd4c8c64b9060a84dc185386f"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_short_name_has_an_address() {
        for model in KnownModel::ALL {
            model.address().unwrap();
            let is_hash =
                |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            assert!(model.sha256.iter().all(|(_, hash)| is_hash(hash)));
            // An address with a file names the one whose hash is recorded.
            if let Some(file) = model.address().unwrap().path {
                assert!(model.sha256.is_empty() || model.sha256.iter().any(|(name, _)| *name == file));
            }
            assert_eq!(KnownModel::named(model.name).unwrap().address, model.address);
        }
        let known = KnownModel::named("bitnet-2b4t").unwrap();
        assert!(known.check("README.md", "00").is_ok());
        assert!(known.check("config.json", "00").unwrap_err().to_string().contains("recorded"));
        assert!(known.check("config.json", &BITNET_2B4T[0].1.to_uppercase()).is_ok());
    }
}
