//! Capped collecting of a body, with its trailers.

use std::pin::Pin;
use std::{iter, mem};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Body;
use http_body_util::BodyExt as _;

/// How much room is made at once, in bytes, however little has come.
const MAX_RESERVED: usize = 256 << 10;

/// From which size on, in bytes, a frame stays what it is until all have come. A server reads into buffers of its own, up to 408 KiB with
/// hyper over HTTP/1.1: who copies what comes has the body beside the buffer for the next frame, for as long as the body lasts.
const LARGE: usize = 64 << 10;

/// Collects a body up to a cap, and gives back what it has where that is not the whole.
///
/// Cancelling a call of [`Collector::fill`] loses nothing.
#[derive(Debug)]
pub(crate) struct Collector<B> {
    body: Pin<Box<B>>,
    data: Data,
    trailers: Option<Box<HeaderMap>>,
    cap: usize,
}

#[derive(Debug, Default)]
struct Data {
    /// The usual body is one frame and is never copied.
    first: Bytes,
    rest: Option<Box<Rest>>,
    len: usize,
}

/// What comes behind the first frame.
#[derive(Debug, Default)]
struct Rest {
    frames: Vec<Bytes>,
    /// Frames that are small, since the last that was large.
    tail: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Filled {
    OverCap,
    Whole,
}

impl<B: Body<Data = Bytes>> Collector<B> {
    pub(crate) fn new(body: B, cap: usize) -> Self {
        Self { body: Box::pin(body), data: Data::default(), trailers: None, cap }
    }

    /// Reads to the end or past the cap. A body announced as too large is not read at all; the announcement is never
    /// trusted for less.
    pub(crate) async fn fill(&mut self) -> Result<Filled, B::Error> {
        let announced = self.body.size_hint().lower();
        if announced.saturating_add(self.data.len as u64) > self.cap as u64 {
            return Ok(Filled::OverCap);
        }
        loop {
            // A body that is always ready, with frames that are empty, would keep its thread and never time out.
            tokio::task::consume_budget().await;
            let Some(frame) = self.body.frame().await else { return Ok(Filled::Whole) };
            match frame?.into_data() {
                Ok(data) => {
                    let announced = usize::try_from(self.body.size_hint().lower()).unwrap_or(usize::MAX);
                    self.data.push(data, announced.min(self.cap));
                }
                // Nothing follows trailers, even where the body is slow to say so.
                Err(frame) => {
                    self.trailers = frame.into_trailers().ok().map(Box::new);
                    return Ok(Filled::Whole);
                }
            }
            if self.data.len > self.cap {
                return Ok(Filled::OverCap);
            }
        }
    }

    /// Whether nothing has been read, because more was announced than may come.
    pub(crate) fn is_untouched(&self) -> bool {
        self.data.len == 0
    }

    /// Reads on for at most so many bytes and forgets them.
    pub(crate) async fn discard(&mut self, mut bytes: usize) {
        loop {
            tokio::task::consume_budget().await;
            let Some(Ok(frame)) = self.body.frame().await else { return };
            let data = frame.data_ref().map_or(0, Bytes::len);
            match bytes.checked_sub(data) {
                Some(left) => bytes = left,
                None => return,
            }
        }
    }

    /// What has been collected, and what has not been read.
    pub(crate) fn into_parts(self) -> (Bytes, Option<Box<HeaderMap>>, Pin<Box<B>>) {
        (self.data.into_bytes(), self.trailers, self.body)
    }
}

// === impl Data ===

impl Data {
    /// Takes a frame, of which so much is announced to follow.
    fn push(&mut self, more: Bytes, announced: usize) {
        if more.is_empty() {
            return;
        }
        if self.len == 0 {
            self.len = more.len();
            self.first = more;
            return;
        }
        self.len += more.len();
        let rest = self.rest.get_or_insert_default();
        if more.len() >= LARGE {
            rest.end_tail();
            rest.frames.push(more);
            return;
        }
        if self.first.len() < LARGE && rest.frames.is_empty() {
            append(&mut rest.tail, &mem::take(&mut self.first), announced.saturating_add(more.len()));
        }
        append(&mut rest.tail, &more, announced);
    }

    fn into_bytes(self) -> Bytes {
        let Some(mut rest) = self.rest else { return self.first };
        if self.first.is_empty() && rest.frames.is_empty() {
            rest.tail.shrink_to_fit();
            return rest.tail.into();
        }
        rest.end_tail();
        let mut whole = Vec::with_capacity(self.len);
        // Each is dropped when it has been copied.
        for frame in iter::once(self.first).chain(rest.frames) {
            whole.extend_from_slice(&frame);
        }
        whole.into()
    }
}

// === impl Rest ===

impl Rest {
    /// What comes next is large.
    fn end_tail(&mut self) {
        if !self.tail.is_empty() {
            let mut tail = mem::take(&mut self.tail);
            tail.shrink_to_fit();
            self.frames.push(tail.into());
        }
    }
}

/// Appends to what has come. Room is made for what is announced to follow and no more, or else for a quarter: a vector by itself
/// takes twice what it has, and a hundred large bodies at once would take the memory of two hundred. What is announced
/// may never come, so it is made room for no faster than it does.
fn append(many: &mut Vec<u8>, more: &[u8], announced: usize) {
    let length = many.len() + more.len();
    if length > many.capacity() {
        let ahead = match announced {
            0 => length.min(MAX_RESERVED).max(length / 4),
            announced => announced.min(length.max(MAX_RESERVED)),
        };
        many.reserve_exact(more.len() + ahead);
    }
    many.extend_from_slice(more);
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body::Frame;
    use http_body_util::{Full, StreamBody};

    use super::*;
    use crate::body::RequestBody;

    fn frames(frames: Vec<Frame<Bytes>>) -> impl Body<Data = Bytes, Error = Infallible> + Unpin {
        StreamBody::new(futures_util::stream::iter(frames.into_iter().map(Ok)))
    }

    fn data(data: &'static str) -> Frame<Bytes> {
        Frame::data(Bytes::from_static(data.as_bytes()))
    }

    #[tokio::test]
    async fn a_body_is_collected_whole_with_its_trailers() {
        let trailers = HeaderMap::from_iter([(http::header::ETAG, http::HeaderValue::from_static("1"))]);
        let body = frames(vec![data("ab"), data(""), data("cd"), Frame::trailers(trailers.clone())]);
        let mut collector = Collector::new(body, 4);
        assert_eq!(collector.fill().await, Ok(Filled::Whole));
        let (bytes, found, _) = collector.into_parts();
        assert_eq!((&bytes[..], found), (&b"abcd"[..], Some(Box::new(trailers))));
    }

    #[tokio::test]
    async fn one_frame_is_not_copied() {
        let bytes = Bytes::from(vec![7; 100]);
        let mut collector = Collector::new(Full::new(bytes.clone()), 100);
        assert_eq!(collector.fill().await, Ok(Filled::Whole));
        assert_eq!(collector.into_parts().0.as_ptr(), bytes.as_ptr());
    }

    #[tokio::test]
    async fn small_and_large_frames_are_one_body_in_any_order() {
        let sizes = [&[1, LARGE, 2, 3, LARGE + 1, LARGE, 4][..], &[LARGE, 5], &[5, LARGE], &[LARGE, LARGE], &[1, 2, 3]];
        for sizes in sizes {
            let mut bytes = (0..=u8::MAX).cycle();
            let pieces: Vec<Bytes> = sizes.iter().map(|size| bytes.by_ref().take(*size).collect()).collect();
            let mut collector = Collector::new(frames(pieces.iter().cloned().map(Frame::data).collect()), 4 * LARGE);
            assert_eq!(collector.fill().await, Ok(Filled::Whole));
            assert!(collector.into_parts().0 == pieces.concat(), "{sizes:?}");
        }
    }

    #[tokio::test]
    async fn what_is_over_the_cap_is_given_back_whole() {
        let mut collector = Collector::new(frames(vec![data("ab"), data("cd"), data("ef")]), 3);
        assert_eq!(collector.fill().await, Ok(Filled::OverCap));
        let (bytes, _, rest) = collector.into_parts();
        let resumed = RequestBody::resumed(bytes, rest).collect().await.unwrap();
        assert_eq!(resumed.to_bytes(), "abcdef");
    }

    #[tokio::test]
    async fn a_body_announced_as_too_large_is_not_read() {
        let mut collector = Collector::new(Full::new(Bytes::from_static(b"abcd")), 3);
        assert_eq!(collector.fill().await, Ok(Filled::OverCap));
        assert!(collector.into_parts().0.is_empty());
    }

    #[tokio::test]
    async fn an_announcement_alone_takes_no_memory() {
        struct Boastful(Vec<Frame<Bytes>>);
        impl Body for Boastful {
            type Data = Bytes;
            type Error = Infallible;

            fn poll_frame(
                mut self: Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
                std::task::Poll::Ready(self.0.pop().map(Ok))
            }

            fn size_hint(&self) -> http_body::SizeHint {
                http_body::SizeHint::with_exact(1 << 40)
            }
        }
        let mut collector = Collector::new(Boastful(vec![data("b"), data("a")]), usize::MAX);
        assert_eq!(collector.fill().await, Ok(Filled::Whole));
        assert_eq!(collector.into_parts().0, "ab");
    }

    #[test]
    fn bodies_take_the_room_of_what_is_announced_or_a_quarter_more() {
        const LENGTH: usize = 1_200_000;
        let frame = [7; 1000];
        let (mut announced, mut unknown) = (Vec::new(), Vec::new());
        for left in (0..LENGTH).step_by(frame.len()).rev() {
            append(&mut announced, &frame, left);
            append(&mut unknown, &frame, 0);
            assert!(announced.capacity() <= LENGTH);
            assert!(announced.capacity() <= (2 * announced.len()).max(announced.len() + MAX_RESERVED));
            assert!(unknown.capacity() <= unknown.len() + MAX_RESERVED.max(unknown.len() / 4));
        }
        assert_eq!((announced.len(), unknown.len()), (LENGTH, LENGTH));
    }

    #[tokio::test]
    async fn a_body_of_nothing_without_an_end_times_out() {
        let empty = StreamBody::new(futures_util::stream::repeat_with(|| Ok::<_, Infallible>(data(""))));
        let mut collector = Collector::new(empty, 10);
        let timeout = tokio::time::timeout(std::time::Duration::from_millis(50), collector.fill());
        assert!(timeout.await.is_err());
    }
}
