//! Bodies of requests: JSON of two shapes, in one frame or in several.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// A body that comes in frames of a size, and says how long it is.
pub struct Pieces {
    rest: Bytes,
    frame: usize,
}

impl Pieces {
    pub const fn new(bytes: Bytes, frame: usize) -> Self {
        Self { rest: bytes, frame }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.frame.min(self.rest.len());
        let piece = self.rest.split_to(length);
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// An event whose bulk is a list of objects inside the object that the key is in.
pub fn nested(length: usize) -> Bytes {
    let mut json = r#"{"type":"invoice.paid","data":{"object":{"lines":["#.to_owned();
    for line in 0.. {
        let last = json.len() + 200 > length;
        let end = if last { "" } else { "," };
        write!(json, r#"{{"id":"il_{line:06}","amount":{},"price":{{"currency":"eur","tax":0.19}}}}{end}"#, line * 10)
            .unwrap();
        if last {
            break;
        }
    }
    json += r#"],"id":"in_1"}}}"#;
    Bytes::from(json)
}

/// The path of the key in both.
pub const NESTED_KEY: &str = "$.data.object.id";
pub const FLAT_KEY: &str = "$.id";

/// One object with as many members as fit, 2,500 of them in 64 KiB.
pub fn flat(length: usize) -> Bytes {
    let mut json = "{".to_owned();
    for member in 0.. {
        if json.len() + 40 > length {
            break;
        }
        write!(json, r#""field_{member:05}":"{:09}","#, member * 7).unwrap();
    }
    json += r#""id":"in_1"}"#;
    Bytes::from(json)
}
