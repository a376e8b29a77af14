//! A limit in time, without a timer for what is ready at once.
//!
//! Most of what has a limit here is: a body that has come with its head, a service that is ready, a store in memory. To set up
//! a timer costs as much as all of that.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::coop::{Unconstrained, unconstrained};
use tokio::time::{Sleep, sleep};

/// What comes of something within a limit. See [`within`].
#[must_use]
pub(crate) struct Within<F> {
    future: F,
    limit: Duration,
    // In a box, or each future that waits for another would be larger by a timer for each of them.
    timer: Option<Pin<Box<Unconstrained<Sleep>>>>,
}

/// What comes of it, unless that takes longer. The limit counts from the end of its first poll.
pub(crate) const fn within<F: Future + Unpin>(limit: Duration, future: F) -> Within<F> {
    Within { future, limit, timer: None }
}

impl<F: Future + Unpin> Future for Within<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(output) = Pin::new(&mut this.future).poll(cx) {
            return Poll::Ready(Some(output));
        }
        // What uses up the turn of its task each time it is polled has its limit all the same.
        let timer = this.timer.get_or_insert_with(|| Box::pin(unconstrained(sleep(this.limit))));
        timer.as_mut().poll(cx).map(|()| None)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn, ready};
    use std::pin::pin;

    use futures_util::FutureExt as _;
    use tokio::task::coop::consume_budget;
    use tokio::time::Instant;

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
