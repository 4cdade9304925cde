//! `ternion schema`: the JSON schema of the configuration, for editors and for checks.

use ternion::config::Config;

use crate::App;
use crate::failure::Outcome;

pub(crate) fn run(app: &App) -> Outcome {
    app.output.object(&Config::schema())
}
