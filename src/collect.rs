//! Capped collecting of a body, with its trailers.

use std::pin::Pin;

use bytes::Bytes;
use http::HeaderMap;
use http_body::Body;
use http_body_util::BodyExt as _;

/// How much room is made at once, in bytes, however little has come.
const MAX_RESERVED: usize = 256 << 10;

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

#[derive(Debug)]
enum Data {
    /// The usual body is one frame and is never copied.
    One(Bytes),
    Many(Vec<u8>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Filled {
    OverCap,
    Whole,
}

impl<B: Body<Data = Bytes>> Collector<B> {
    pub(crate) fn new(body: B, cap: usize) -> Self {
        Self { body: Box::pin(body), data: Data::One(Bytes::new()), trailers: None, cap }
    }

    /// Reads to the end or past the cap. A body announced as too large is not read at all; the announcement is never
    /// trusted for less.
    pub(crate) async fn fill(&mut self) -> Result<Filled, B::Error> {
        let announced = self.body.size_hint().lower();
        if announced.saturating_add(self.len() as u64) > self.cap as u64 {
            return Ok(Filled::OverCap);
        }
        loop {
            // A body that is always ready, with frames that are empty, would keep its thread and never time out.
            tokio::task::consume_budget().await;
            let Some(frame) = self.body.frame().await else { return Ok(Filled::Whole) };
            match frame?.into_data() {
                Ok(data) => self.push(data),
                // Nothing follows trailers, even where the body is slow to say so.
                Err(frame) => {
                    self.trailers = frame.into_trailers().ok().map(Box::new);
                    return Ok(Filled::Whole);
                }
            }
            if self.len() > self.cap {
                return Ok(Filled::OverCap);
            }
        }
    }

    /// Whether nothing has been read, because more was announced than may come.
    pub(crate) fn is_untouched(&self) -> bool {
        self.len() == 0
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

    fn push(&mut self, more: Bytes) {
        let announced = usize::try_from(self.body.size_hint().lower()).unwrap_or(usize::MAX).min(self.cap);
        match &mut self.data {
            _ if more.is_empty() => {}
            Data::One(one) if one.is_empty() => *one = more,
            Data::One(one) => {
                let mut many = Vec::new();
                append(&mut many, one, announced.saturating_add(more.len()));
                append(&mut many, &more, announced);
                self.data = Data::Many(many);
            }
            Data::Many(many) => append(many, &more, announced),
        }
    }

    fn len(&self) -> usize {
        match &self.data {
            Data::One(one) => one.len(),
            Data::Many(many) => many.len(),
        }
    }

    /// What has been collected, and what has not been read.
    pub(crate) fn into_parts(self) -> (Bytes, Option<Box<HeaderMap>>, Pin<Box<B>>) {
        let data = match self.data {
            Data::One(one) => one,
            Data::Many(mut many) => {
                many.shrink_to_fit();
                Bytes::from(many)
            }
        };
        (data, self.trailers, self.body)
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
