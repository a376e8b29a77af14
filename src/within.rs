//! A limit in time, without a timer for what is ready at once.
//!
//! Most of what has a limit here is: a body that has come with its head, a service that is ready, a store in memory. To set up
//! a timer costs as much as all of that.

use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::coop::{Unconstrained, unconstrained};
use tokio::time::{Instant, Sleep, sleep_until};

/// What comes of something within a limit. See [`within`].
#[must_use]
pub(crate) struct Within<F> {
    future: F,
    limit: Duration,
    /// The first time that it is not ready needs no timer.
    is_spared: bool,
    started: Option<Instant>,
    // In a box, or each future that waits for another would be larger by a timer for each of them.
    timer: Option<Pin<Box<Unconstrained<Sleep>>>>,
}

/// What comes of it, unless that takes longer. The limit counts from the end of its first poll.
pub(crate) const fn within<F: Future + Unpin>(limit: Duration, future: F) -> Within<F> {
    Within { future, limit, is_spared: false, started: None, timer: None }
}

// === impl Within ===

impl<F> Within<F> {
    /// Spares it the timer as long as it waits for a first thing that has a limit of its own, by which it is polled again.
    pub(crate) fn spared_until(mut self, first_limit: Duration) -> Self {
        self.is_spared = first_limit <= self.limit;
        self
    }
}

impl<F: Future + Unpin> Future for Within<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(output) = Pin::new(&mut this.future).poll(cx) {
            return Poll::Ready(Some(output));
        }
        let started = *this.started.get_or_insert_with(Instant::now);
        if mem::take(&mut this.is_spared) {
            return Poll::Pending;
        }
        // What uses up the turn of its task each time it is polled has its limit all the same.
        let timer = this.timer.get_or_insert_with(|| Box::pin(unconstrained(sleep_until(started + this.limit))));
        timer.as_mut().poll(cx).map(|()| None)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn, ready};
    use std::pin::pin;

    use futures_util::FutureExt as _;
    use tokio::task::coop::consume_budget;
    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_ready_needs_no_runtime() {
        assert_eq!(within(LIMIT, ready(1)).now_or_never(), Some(Some(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_is_given_up_and_what_does_not_is_not() {
        let started = Instant::now();
        assert_eq!(within(LIMIT, pin!(sleep(LIMIT / 2))).await, Some(()));
        assert_eq!(within(LIMIT, pending::<()>()).await, None);
        assert_eq!(started.elapsed(), LIMIT * 3 / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_spared_at_first_is_given_up_in_the_same_time() {
        let calls = |first| {
            Box::pin(async move {
                sleep(first).await;
                pending::<()>().await
            })
        };
        for first in [LIMIT / 4, LIMIT] {
            let started = Instant::now();
            assert_eq!(within(LIMIT, calls(first)).spared_until(first).await, None);
            assert_eq!(started.elapsed(), LIMIT, "after {first:?}");
        }
        let started = Instant::now();
        assert_eq!(within(LIMIT, calls(LIMIT * 2)).spared_until(LIMIT * 2).await, None);
        assert_eq!(started.elapsed(), LIMIT);
    }

    #[tokio::test]
    async fn what_is_busy_all_the_time_is_given_up() {
        let busy = poll_fn(|cx| {
            // To the end of its turn, as what comes without an end does.
            while pin!(consume_budget()).poll(cx).is_ready() {}
            Poll::<()>::Pending
        });
        assert_eq!(within(Duration::from_millis(5), busy).await, None);
    }
}
