//! Where the time of training steps goes: the parts, waiting for the slowest rank, the exchange.

use std::fmt;
use std::ops::AddAssign;
use std::time::Duration;

/// Times of one step or the sum over several, means over the ranks.
///
/// [Example](crate::train::Trainer)
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Number of steps.
    pub steps: u64,
    /// Forward and backward of a rank's parts, with the drawing of their data.
    pub compute: Duration,
    /// From the end of a rank's part to that of the slowest rank's.
    pub waiting: Duration,
    /// Exchange of losses and gradients once all ranks are there, and the sums.
    pub exchange: Duration,
    /// Norm, clipping and optimizer.
    pub update: Duration,
}

impl StepTimes {
    /// Notes a part: how long each rank computed, this rank too, and how long it was until this rank had the sum.
    pub(super) fn part(&mut self, all: &[Duration], own: Duration, until_sum: Duration) {
        let mean = all.iter().sum::<Duration>() / (all.len().max(1) as u32);
        let slowest = all.iter().copied().max().unwrap_or(own);
        self.compute += mean;
        self.waiting += slowest.saturating_sub(mean);
        // Clocks of ranks begin when each leaves the last exchange, so a rank may seem to end before the slowest.
        self.exchange += until_sum.saturating_sub(slowest.max(own));
    }

    /// Time of the steps.
    pub fn total(&self) -> Duration {
        self.compute + self.waiting + self.exchange + self.update
    }
}

impl AddAssign for StepTimes {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.compute += other.compute;
        self.waiting += other.waiting;
        self.exchange += other.exchange;
        self.update += other.update;
    }
}

/// The mean step and the shares of it.
impl fmt::Display for StepTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total().as_secs_f64().max(f64::MIN_POSITIVE);
        let percent = |time: Duration| 100.0 * time.as_secs_f64() / total;
        write!(
            f,
            "{:.3} s a step: {:.1} % forward and backward, {:.1} % waiting for the slowest process, {:.1} % exchange, \
             {:.1} % update",
            total / self.steps.max(1) as f64,
            percent(self.compute),
            percent(self.waiting),
            percent(self.exchange),
            percent(self.update)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_divided_between_compute_waiting_and_exchange() {
        let seconds = Duration::from_secs;
        let mut times = StepTimes { steps: 1, ..Default::default() };
        times.part(&[seconds(2), seconds(6)], seconds(2), seconds(7));
        times.update = seconds(2);
        let expected = [seconds(4), seconds(2), seconds(1), seconds(9)];
        assert_eq!([times.compute, times.waiting, times.exchange, times.total()], expected);
        let mut twice = times;
        twice += times;
        let said =
            "9.000 s a step: 44.4 % forward and backward, 22.2 % waiting for the slowest process, \
                    11.1 % exchange, 22.2 % update";
        assert_eq!(twice.to_string(), said);
        assert_eq!(StepTimes::default().total(), Duration::ZERO);
    }
}
