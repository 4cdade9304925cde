//! `ternion schema`: the JSON schema of the configuration, for editors and for checks.

use crate::App;
use crate::failure::Outcome;

pub(crate) fn run(app: &App) -> Outcome {
    app.output.object(&ternion::registry().schema())
}
