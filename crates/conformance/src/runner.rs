//! The checks as tests of `cargo test`, on `libtest-mimic`.

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use ternion_core::{LlmBackend, Result};
use tokio::runtime::Runtime;

use crate::{Aspect, Check, Failure, Outcome, Reference, all};

/// Runs all checks on one backend: the whole `main` of a test without harness. The arguments are those of `cargo test`.
///
/// `factory` loads the model: at the start, and again after a check that failed, so that what it left behind does not fail
/// the next one.
pub fn run<F>(name: &str, factory: F) -> ExitCode
where
    F: AsyncFn() -> Result<Arc<dyn LlmBackend>> + Send + Sync + 'static,
{
    Suite::new().backend(name, factory).run()
}

/// Several backends in one test program, with references.
#[derive(Default)]
pub struct Suite {
    subjects: Vec<Subject>,
}

enum Subject {
    Backend { name: String, load: Load, references: Vec<Reference> },
    Skipped { name: String, reason: String },
}

type Load = Box<dyn Fn(&Runtime) -> Result<Arc<dyn LlmBackend>> + Send + Sync>;

impl Suite {
    /// An empty suite.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend, whose tests are called `NAME::module::function`.
    pub fn backend<F>(self, name: impl Into<String>, factory: F) -> Self
    where
        F: AsyncFn() -> Result<Arc<dyn LlmBackend>> + Send + Sync + 'static,
    {
        self.backend_with(name, Vec::new(), factory)
    }

    /// Adds a backend that is also compared with `references`: `NAME::reference::CASE::aspect`.
    pub fn backend_with<F>(mut self, name: impl Into<String>, references: Vec<Reference>, factory: F) -> Self
    where
        F: AsyncFn() -> Result<Arc<dyn LlmBackend>> + Send + Sync + 'static,
    {
        let load: Load = Box::new(move |runtime| runtime.block_on(factory()));
        self.subjects.push(Subject::Backend { name: name.into(), load, references });
        self
    }

    /// Adds a backend that cannot be tried here; the report says so with the reason.
    pub fn skip(mut self, name: impl Into<String>, reason: impl Into<String>) -> Self {
        self.subjects.push(Subject::Skipped { name: name.into(), reason: reason.into() });
        self
    }

    /// Runs the tests and reports on them. A check that does not apply is ignored, with the reason in front of its name. The
    /// checks of one backend run one after the other, those of several backends side by side.
    ///
    /// The models are loaded before the first test. One that cannot be loaded fails the test `NAME::load`.
    pub fn run(self) -> ExitCode {
        let arguments = Arguments::from_args();
        let runtime = match Runtime::new() {
            Ok(runtime) => Arc::new(runtime),
            Err(error) => {
                eprintln!("error: cannot start a runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
        let trials = self.subjects.into_iter().flat_map(|subject| trials(subject, &runtime)).collect();
        libtest_mimic::run(&arguments, trials).exit_code()
    }
}

/// The model that the checks of one backend share.
struct Shared {
    runtime: Arc<Runtime>,
    load: Load,
    /// Given up when a check failed.
    model: Mutex<Option<Arc<dyn LlmBackend>>>,
}

impl Shared {
    fn run<T>(
        &self,
        check: impl AsyncFnOnce(&dyn LlmBackend) -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failed> {
        // A check that panicked has left nothing in the lock: the model was taken out.
        let mut place = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let model = match place.take() {
            Some(model) => model,
            None => (self.load)(&self.runtime)?,
        };
        let found = self.runtime.block_on(check(&*model))?;
        *place = Some(model);
        Ok(found)
    }
}

fn trials(subject: Subject, runtime: &Arc<Runtime>) -> Vec<Trial> {
    match subject {
        Subject::Skipped { name, reason } => vec![ignored(&format!("{name}::load"), reason)],
        Subject::Backend { name, load, references } => match load(runtime) {
            Err(error) => {
                let error = error.to_string();
                vec![Trial::test(format!("{name}::load"), move || Err(error.into()))]
            }
            Ok(model) => of_model(&name, model, load, references, runtime),
        },
    }
}

fn of_model(
    name: &str,
    model: Arc<dyn LlmBackend>,
    load: Load,
    references: Vec<Reference>,
    runtime: &Arc<Runtime>,
) -> Vec<Trial> {
    let skipped = |check: &Check| check.skipped(&*model);
    let plans: Vec<(Check, Option<String>)> = all().map(|check| (*check, skipped(check))).collect();
    let aspects: Vec<(Reference, Aspect, Option<String>)> = references
        .into_iter()
        .flat_map(|reference| {
            let aspects = Aspect::ALL.into_iter().filter(|a| a.is_in(&reference)).collect::<Vec<_>>();
            aspects.into_iter().map(move |aspect| (reference.clone(), aspect))
        })
        .map(|(reference, aspect)| {
            let reason = aspect.skipped(&*model);
            (reference, aspect, reason)
        })
        .collect();
    let shared = Arc::new(Shared { runtime: Arc::clone(runtime), load, model: Mutex::new(Some(model)) });
    let mut trials = Vec::new();
    for (check, reason) in plans {
        let test = format!("{name}::{}", check.name);
        let shared = Arc::clone(&shared);
        trials.push(match reason {
            Some(reason) => ignored(&test, reason),
            None => Trial::ignorable_test(test, move || {
                shared.run(async |model| match check.outcome(model).await {
                    Outcome::Passed => Ok(Completion::Completed),
                    Outcome::Skipped(reason) => Ok(Completion::ignored_with(reason)),
                    Outcome::Failed(failure) => Err(failure),
                })
            }),
        });
    }
    for (reference, aspect, reason) in aspects {
        let test = format!("{name}::reference::{}::{}", reference.name, aspect.name());
        let shared = Arc::clone(&shared);
        trials.push(match reason {
            Some(reason) => ignored(&test, reason),
            None => Trial::test(test, move || shared.run(async |model| reference.check(model, aspect).await)),
        });
    }
    trials
}

/// A test that is reported as ignored, and says why when it is asked for all the same.
fn ignored(name: &str, reason: String) -> Trial {
    let kind = format!("skipped: {reason}");
    Trial::test(name, move || Err(reason.into())).with_kind(kind).with_ignored_flag(true)
}
