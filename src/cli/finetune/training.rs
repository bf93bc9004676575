//! The steps of a run: train, evaluate now and then, keep the best, save, log, stop.

use super::super::processes::on_first;
use super::options::Options;
use super::output::{self, ADAPTER, BEST, STATE, TABLE, TENSORBOARD};
use crate::lora::{save_adapter, LoraConfig};
use crate::sam::SamModel;
use crate::train::{
    best_evaluation, evaluations_since_best, Communicator, EventFile, HeldOutScores, MetricsCsv,
    ObjectScores, StepMetrics, Trainer,
};
use crate::Result;
use anyhow::{anyhow, bail};
use indicatif::ProgressBar;

/// A run on its way.
pub struct Run<'a> {
    /// The options of the run.
    pub options: &'a Options,
    /// The model that is trained.
    pub sam: &'a SamModel,
    /// Its adapters.
    pub lora: &'a LoraConfig,
    /// Steps between two evaluations.
    pub eval_steps: Option<u64>,
    /// Who trains together; the first writes.
    pub processes: &'a dyn Communicator,
}

impl Run<'_> {
    /// Starts or resumes the run, and makes its steps.
    pub fn steps(
        &self,
        trainer: &mut Trainer,
        mut step: impl FnMut(&mut Trainer) -> candle_core::Result<StepMetrics>,
        evaluate: impl Fn() -> anyhow::Result<HeldOutScores>,
    ) -> anyhow::Result<()> {
        let (options, state) = (self.options, self.options.output.join(STATE));
        let console = options.console;
        // Before anything is written.
        trainer.agree()?;
        if options.resume {
            if let Some(damage) = trainer.resume(&state)? {
                console.note(format!("{damage}; taking the state before it"));
            }
            self.on_first(|| Ok(output::begin(options)?))?;
            console.note(format!("going on after step {}", trainer.steps()));
        } else {
            self.on_first(|| Ok(output::begin(options)?))?;
            trainer.save(&state)?;
        }
        let mut log = None;
        self.on_first(|| {
            log = Some(Log::open(options, trainer.steps())?);
            Ok(())
        })?;
        let bar = progress_bar(options, trainer.steps());
        while trainer.steps() < options.steps && !self.impatient(trainer) {
            let is_last = |step: u64| step == options.steps;
            let is_due = |step: u64| {
                self.eval_steps.is_some_and(|every| step.is_multiple_of(every) || is_last(step))
            };
            let stepped = step(trainer).and_then(|made| {
                // A step that follows tells of parameters that are not finite; after these none may follow.
                if is_last(made.step) || is_due(made.step) {
                    trainer.check_parameters()?;
                }
                Ok(made)
            });
            let made = match stepped {
                Ok(made) => made,
                Err(error) => return Err(self.keep_the_good(trainer, error)?),
            };
            let judged = || trainer.with_averages(|| bar.suspend(&evaluate));
            let scores = is_due(made.step).then(judged).transpose()?.transpose()?;
            if let Some(scores) = scores {
                trainer.note(scores);
                if best_evaluation(trainer.evaluations()).is_some_and(|best| best.step == made.step)
                {
                    trainer.with_averages(|| self.save(BEST))??;
                }
            }
            self.on_first(|| match &mut log {
                Some(log) => Ok(log.note(&made, scores.as_ref())?),
                None => Ok(()),
            })?;
            let saved = made.step.is_multiple_of(options.save_every) || is_last(made.step);
            if saved || self.impatient(trainer) {
                trainer.save(&state)?;
            }
            bar.set_message(format!("{:.4}", made.loss));
            bar.inc(1);
            // Without a terminal there is no bar; a line now and then tells that it goes on.
            if saved && bar.is_hidden() {
                console.note(format!(
                    "step {} of {}: loss {:.4}",
                    made.step, options.steps, made.loss
                ));
            }
            if let Some(scores) = scores {
                let line = line(&scores);
                bar.suspend(|| console.note(format!("step {}: held-out {line}", made.step)));
            }
        }
        bar.finish();
        if let Some(best) = best_evaluation(trainer.evaluations()) {
            if self.impatient(trainer) {
                console.note(format!(
                    "stopped after step {}: no better than step {}",
                    trainer.steps(),
                    best.step
                ));
            }
            console.note(format!(
                "best: step {}, IoU {:.4}, in {BEST}/",
                best.step, best.scores.objects.iou
            ));
        }
        Ok(())
    }

    /// Saves the adapter as it is.
    fn save(&self, folder: &str) -> anyhow::Result<()> {
        self.on_first(|| Ok(save_adapter(self.sam, self.lora, self.options.output.join(folder))?))
    }

    fn on_first(&self, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        on_first(self.processes, work)
    }

    /// Whether the evaluations have been no better for long enough.
    fn impatient(&self, trainer: &Trainer) -> bool {
        self.options.patience.is_some_and(|patience| {
            !trainer.evaluations().is_empty()
                && evaluations_since_best(trainer.evaluations()) >= patience.max(1)
        })
    }

    /// After a step that failed: the error, once the adapter of the last good state is in its place.
    fn keep_the_good(
        &self,
        trainer: &mut Trainer,
        error: candle_core::Error,
    ) -> anyhow::Result<anyhow::Error> {
        let output = &self.options.output;
        if let Err(other) = trainer.roll_back(output.join(STATE)) {
            bail!("{error}\nand the state before it could not be read: {other}")
        }
        trainer.with_averages(|| self.save(ADAPTER))??;
        Ok(anyhow!(
            "{error}\nkept in {}: the adapter as it was after step {}, in {ADAPTER}/{}",
            output.display(),
            trainer.steps(),
            match best_evaluation(trainer.evaluations()) {
                Some(best) => format!("; the best one, of step {}, in {BEST}/", best.step),
                None => String::new(),
            }
        ))
    }
}

/// Where figures go.
struct Log {
    table: MetricsCsv,
    events: Option<EventFile>,
}

impl Log {
    fn open(options: &Options, steps: u64) -> Result<Self> {
        let events = || EventFile::create(options.output.join(TENSORBOARD), steps);
        Ok(Self {
            table: MetricsCsv::open(options.output.join(TABLE), steps)?,
            events: options.tensorboard.then(events).transpose()?,
        })
    }

    fn note(&mut self, step: &StepMetrics, scores: Option<&HeldOutScores>) -> Result<()> {
        self.table.row(step, scores)?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let mut values = vec![
            ("train/loss", step.loss),
            ("train/lr", step.lr as f32),
            ("train/grad_norm", step.grad_norm as f32),
        ];
        let names: Vec<String> =
            HeldOutScores::names().map(|name| format!("held_out/{name}")).collect();
        let found = scores.map(HeldOutScores::values).into_iter().flatten();
        values.extend(
            names.iter().zip(found).filter_map(|(name, value)| Some((&**name, value? as f32))),
        );
        events.scalars(step.step, &values)
    }
}

/// The scores of an evaluation in one line.
fn line(HeldOutScores { objects, masks }: &HeldOutScores) -> String {
    let ObjectScores { iou, dice, boundary_f1, iou_at_3, iou_at_5, iou_error } = objects;
    let masks =
        masks.map_or_else(String::new, |masks| format!("; automatic masks, AP {:.4}", masks.ap));
    format!(
        "IoU {iou:.4}, Dice {dice:.4}, boundary F1 {boundary_f1:.4}, IoU with 3 prompts {iou_at_3:.4}, \
         with 5 {iou_at_5:.4}; predicted IoU off by {iou_error:.4}{masks}"
    )
}

fn progress_bar(options: &Options, done: u64) -> ProgressBar {
    let bar = options.console.bar(options.steps, "steps  loss {msg}").with_position(done);
    bar.reset_eta();
    bar
}
