//! How a run is going, on stderr: a bar on a terminal, a line now and then elsewhere.

use crate::log::Row;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

const BETWEEN_LINES: Duration = Duration::from_secs(10);

pub struct Progress {
    /// None where there is no terminal.
    bar: Option<ProgressBar>,
    steps: usize,
    started: Instant,
    first_step: usize,
    last_line: Option<Instant>,
    /// Running mean of the loss: the loss of one batch says little.
    loss: Option<f32>,
}

impl Progress {
    pub fn new(steps: usize, done: usize) -> Self {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = std::io::stderr()
            .is_terminal()
            .then(|| ProgressBar::new(steps as u64).with_style(style).with_position(done as u64));
        Self { bar, steps, started: Instant::now(), first_step: done, last_line: None, loss: None }
    }

    pub fn step(&mut self, row: &Row) {
        let loss = self.loss.map_or(row.loss, |mean| 0.95 * mean + 0.05 * row.loss);
        self.loss = Some(loss);
        let message = format!(
            "loss {loss:.3}  {:.0} tokens/s  {} left",
            row.tokens_per_s,
            clock(self.time_left(row.step)),
        );
        if let Some(bar) = &self.bar {
            bar.set_position(row.step as u64);
            bar.set_message(message);
        } else if self.last_line.is_none_or(|at| at.elapsed() >= BETWEEN_LINES) || row.step == self.steps {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{}  {message}", row.step, self.steps);
        }
    }

    /// A line that stays.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    /// At the pace since the start, validation and checkpoints included.
    fn time_left(&self, step: usize) -> Duration {
        let taken = (step - self.first_step).max(1) as f64;
        let left = self.steps.saturating_sub(step) as f64;
        self.started.elapsed().mul_f64(left / taken)
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}
