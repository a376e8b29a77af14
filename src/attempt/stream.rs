//! A response too large or too slow to be kept: it streams on, and leaves a tombstone when it has ended well.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Response, header, response};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tower::BoxError;

use super::finish::unstored;
use super::{Client, Reply, Run};
use crate::body::{Piece, ResponseBody};
use crate::record::Record;
use crate::telemetry::Executed;

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
        let record = Record::tombstone(&head);
        let left = rest.size_hint().exact().map(|rest| rest + data.len() as u64).or_else(|| announced(&head));
        let (sender, pieces) = mpsc::channel(1);
        client.reply(Reply::Response(unstored(Response::from_parts(head, ResponseBody::piped(pieces, left)))));

        let pumped = AssertUnwindSafe(self.pump(&sender, data, rest, left)).catch_unwind();
        let (remember, executed) = match self.renewing(pumped).await {
            Ok(Ok(last)) if !self.request_failed.is_set() => {
                let pursued = self.settle(record, async |_| finish(&sender, last).await).await;
                return client.close(Executed::Tombstone, pursued);
            }
            Ok(Ok(last)) => {
                finish(&sender, last).await;
                (self.policy.lease, Executed::Released)
            }
            Ok(Err(error)) => {
                let _ = sender.send(Piece::Failed(error)).await;
                (self.policy.retention, Executed::FailedBody)
            }
            // The client sees a body cut short.
            Err(_panic) => (self.policy.retention, Executed::Panicked),
        };
        drop(sender);
        self.release(remember, None, client, executed).await;
    }

    /// Passes the body on and returns its last frame, which must not leave before the tombstone is stored: a client that
    /// knows the length takes it for the end.
    async fn pump<R>(
        &self,
        client: &mpsc::Sender<Piece>,
        data: Bytes,
        mut rest: Pin<Box<R>>,
        mut left: Option<u64>,
    ) -> Result<Option<Frame<Bytes>>, BoxError>
    where
        R: Body<Data = Bytes>,
        R::Error: Into<BoxError>,
    {
        let mut next = (!data.is_empty()).then(|| Frame::data(data));
        let mut gone = false;
        loop {
            if let (Some(left), Some(data)) = (&mut left, next.as_ref().and_then(Frame::data_ref)) {
                *left = left.saturating_sub(data.len() as u64);
            }
            // What could be the last frame is held back until it is known.
            if left != Some(0)
                && let Some(frame) = next.take()
            {
                let _ = client.send(Piece::Frame(frame)).await;
            }
            let frame = loop {
                tokio::select! {
                    biased;
                    frame = rest.frame() => break frame,
                    () = client.closed(), if !gone => gone = true,
                    () = sleep_until(self.overdue), if gone => return Err(Overdue.into()),
                }
            };
            let Some(frame) = frame.transpose().map_err(Into::into)? else { return Ok(next) };
            if let Some(held) = next.replace(frame) {
                let _ = client.send(Piece::Frame(held)).await;
            }
            if rest.is_end_stream() || next.as_ref().is_some_and(Frame::is_trailers) {
                return Ok(next);
            }
        }
    }
}

/// The client has left, and the body did not end in the time of an attempt.
#[derive(Debug)]
struct Overdue;

async fn finish(client: &mpsc::Sender<Piece>, last: Option<Frame<Bytes>>) {
    // A client that has left misses nothing.
    if let Some(last) = last {
        let _ = client.send(Piece::Frame(last)).await;
    }
    let _ = client.send(Piece::End).await;
}

/// How long the body says it is.
fn announced(head: &response::Parts) -> Option<u64> {
    head.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

impl std::fmt::Display for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the response body took longer than an attempt may")
    }
}

impl std::error::Error for Overdue {}
