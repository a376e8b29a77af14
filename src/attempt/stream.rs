//! A response too large or too slow to be kept: it streams on, and leaves a tombstone when it has ended well.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, join};
use http::{HeaderMap, header, response};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tower::BoxError;

use super::finish::unstored;
use super::{Client, Reply, Run, told};
use crate::body::{Piece, ResponseBody};
use crate::telemetry::Executed;

/// How long a client may take for one frame, at least, even when the attempt is overdue.
const MIN_PATIENCE: Duration = Duration::from_secs(30);

impl Run {
    /// The response leaves at once; the body is driven to its end here, whether or not the client stays.
    pub(super) async fn stream<R, E>(
        &self,
        head: response::Parts,
        data: Bytes,
        rest: Pin<Box<R>>,
        mut client: Client<R, E>,
    ) where
        R: Body<Data = Bytes>,
        R::Error: Into<BoxError>,
    {
        let answered = head.clone();
        let left = rest.size_hint().exact().map(|rest| rest + data.len() as u64).or_else(|| announced(&head));
        let (sender, pieces) = mpsc::channel(1);
        client.reply(Reply::Response(unstored(told(head, ResponseBody::piped(pieces, left)))));

        let over = self.overdue() + self.terms.kept_body_timeout;
        let mut pipe = Pipe { client: Some(sender), patient_until: self.overdue(), over };
        let pumped = AssertUnwindSafe(self.pump(&mut pipe, data, rest, left)).catch_unwind().await;
        // A client that is slow to take the end does not hold the key.
        match pumped {
            Ok(Ok(last)) if !self.is_withdrawn() && self.terms.keeps(&answered, trailers(&last)) => {
                let record = self.terms.tombstone(&answered, trailers(&last));
                let pursued = self.settle(record.encode(), async |_| pipe.end(last).await).await;
                client.close(Executed::Tombstone, pursued);
            }
            Ok(Ok(last)) => {
                let remember = if self.is_withdrawn() {
                    self.terms.lease
                } else {
                    self.terms.remembers(&answered, trailers(&last))
                };
                let released = self.release(remember, None, client, Executed::Released);
                join!(released, pipe.end(last));
            }
            Ok(Err(error)) => {
                let released = self.release(self.terms.retention, None, client, Executed::FailedBody);
                join!(released, pipe.fail(error));
            }
            // The client sees a body cut short.
            Err(_panic) => {
                drop(pipe);
                self.release(self.terms.retention, None, client, Executed::Panicked).await;
            }
        }
    }

    /// Passes the body on and returns its last frames, which must not leave before the tombstone is stored: a client that
    /// knows the length takes them for the end.
    async fn pump<R>(
        &self,
        pipe: &mut Pipe,
        data: Bytes,
        mut rest: Pin<Box<R>>,
        mut left: Option<u64>,
    ) -> Result<Vec<Frame<Bytes>>, BoxError>
    where
        R: Body<Data = Bytes>,
        R::Error: Into<BoxError>,
    {
        let mut held = Vec::new();
        let mut next = Frame::data(data);
        loop {
            let data = next.data_ref().map(|data| data.len() as u64);
            if let (Some(left), Some(data)) = (&mut left, data) {
                *left = left.saturating_sub(data);
            }
            if data.is_some_and(|data| data > 0) {
                // More than was announced: what was held back was not the last.
                pipe.send_all(held.drain(..)).await;
            }
            // Empty frames say nothing.
            if data != Some(0) {
                held.push(next);
            }
            if held.iter().any(Frame::is_trailers) || rest.is_end_stream() {
                return Ok(held);
            }
            if left != Some(0) {
                pipe.send_all(held.drain(..)).await;
            }
            // A body that is always ready would keep its thread, and the clock with it.
            tokio::task::consume_budget().await;
            let frame = tokio::select! {
                // In this order, or a body that is always ready would never be given up.
                biased;
                () = pipe.given_up() => return Err(Overdue.into()),
                frame = rest.frame() => frame,
            };
            match frame {
                Some(frame) => next = frame.map_err(Into::into)?,
                None => return Ok(held),
            }
        }
    }
}

/// The way to a client that may be slow, or gone.
struct Pipe {
    client: Option<mpsc::Sender<Piece>>,
    /// From then on, a client that does not take what there is counts as gone.
    patient_until: Instant,
    /// From then on, a client that is gone is not worked for.
    over: Instant,
}

/// The client has left, and the body did not end in the time of an attempt.
#[derive(Debug)]
struct Overdue;

fn trailers(last: &[Frame<Bytes>]) -> Option<&HeaderMap> {
    last.iter().find_map(Frame::trailers_ref)
}

/// How long the body says it is.
fn announced(head: &response::Parts) -> Option<u64> {
    head.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

// === impl Pipe ===

impl Pipe {
    async fn send(&mut self, piece: Piece) {
        if let Some(client) = &self.client {
            let until = self.patient_until.max(Instant::now() + MIN_PATIENCE);
            if !matches!(timeout_at(until, client.send(piece)).await, Ok(Ok(()))) {
                self.client = None;
            }
        }
    }

    async fn send_all(&mut self, frames: impl Iterator<Item = Frame<Bytes>>) {
        for frame in frames {
            self.send(Piece::Frame(frame)).await;
        }
    }

    async fn end(mut self, last: Vec<Frame<Bytes>>) {
        self.send_all(last.into_iter()).await;
        self.send(Piece::End).await;
    }

    async fn fail(mut self, error: BoxError) {
        self.send(Piece::Failed(error)).await;
    }

    /// Returns when the client is gone and the time is over.
    async fn given_up(&self) {
        if let Some(client) = &self.client {
            client.closed().await;
        }
        sleep_until(self.over).await;
    }
}

// === impl Overdue ===

impl std::fmt::Display for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the response body took longer than an attempt may")
    }
}

impl std::error::Error for Overdue {}
