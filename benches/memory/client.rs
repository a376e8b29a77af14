//! Who sends the bodies: as fast as it goes, or piece by piece.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http::{Request, StatusCode, header};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::sleep;

/// Between two pieces.
const PAUSE: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Protocol {
    /// A connection for each request.
    Http1,
    /// The same, to a server whose buffers are bounded.
    Http1Bounded,
    /// One connection for all.
    Http2,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Lengths {
    Announced,
    Unknown,
}

pub struct Sender {
    pub protocol: Protocol,
    pub size: usize,
    pub piece: usize,
    pub lengths: Lengths,
}

impl Sender {
    /// Sends so many requests at once, and returns when all are answered.
    pub async fn send(&self, addr: SocketAddr, requests: usize) {
        let client = Client::builder(TokioExecutor::new())
            .http2_only(self.protocol == Protocol::Http2)
            .build_http::<StreamBody<_>>();
        let answers = join_all((0..requests).map(|id| {
            let mut request = Request::post(format!("http://{addr}/hooks"));
            if self.lengths == Lengths::Announced {
                request = request.header(header::CONTENT_LENGTH, self.size);
            }
            client.request(request.body(StreamBody::new(pieces(self.json(id), self.piece))).unwrap())
        }));
        for answer in answers.await {
            assert_eq!(answer.unwrap().status(), StatusCode::OK);
        }
    }

    fn json(&self, id: usize) -> Bytes {
        let start = format!(r#"{{"id":{id},"filler":""#);
        let filler = "-".repeat(self.size - start.len() - 2);
        Bytes::from(format!(r#"{start}{filler}"}}"#))
    }
}

fn pieces(body: Bytes, piece: usize) -> BoxStream<'static, Result<Frame<Bytes>, Infallible>> {
    stream::unfold(body, move |mut rest| async move {
        let next = rest.split_to(piece.min(rest.len()));
        if !rest.is_empty() {
            sleep(PAUSE).await;
        }
        (!next.is_empty()).then(|| (Ok(Frame::data(next)), rest))
    })
    .boxed()
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http1Bounded => "HTTP/1.1, `max_buf_size` 64 KiB",
            Protocol::Http2 => "HTTP/2",
        };
        let lengths = if self.lengths == Lengths::Announced { "announced" } else { "unknown" };
        let kib = |bytes: usize| bytes >> 10;
        let piece = if self.piece == self.size { "one go".to_owned() } else { format!("{} KiB", kib(self.piece)) };
        write!(f, "{protocol} | {} KiB | {piece} | {lengths}", kib(self.size))
    }
}
