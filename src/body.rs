//! The bodies on both sides of the inner service.
//!
//! Both are types of our own, which is what lets one layer serve axum and hyper.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::sync::mpsc;
use tower::BoxError;

pin_project! {
    /// What the inner service gets to read: the caller's body as it comes, or what the layer has buffered of it.
    ///
    /// An axum router or route takes it as it takes any body. A service of your own names it in its request:
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use http::{Request, Response};
    /// use http_body_util::Full;
    /// use hyper::body::{Bytes, Incoming};
    /// use tower_idempotency::RequestBody;
    ///
    /// async fn handler(request: Request<RequestBody<Incoming>>) -> Result<Response<Full<Bytes>>, Infallible> {
    ///     # let _ = request;
    ///     Ok(Response::new(Full::default()))
    /// }
    /// # let _ = handler;
    /// ```
    ///
    /// Where middleware between the layer and the handler insists on `axum::body::Body`, such as `axum::middleware::from_fn`
    /// inside of one `ServiceBuilder`, map the request there with
    /// `tower::util::MapRequestLayer::new(|request: Request<RequestBody<Body>>| request.map(Body::new))`.
    #[derive(Debug)]
    pub struct RequestBody<B> {
        buffered: Buffered,
        // The caller's body, where the layer has not touched it.
        #[pin]
        rest: Option<B>,
        // What follows what is buffered, where that is not the whole.
        started: Option<Pin<Box<B>>>,
        // Set when the caller's body fails.
        failed: Failed,
    }
}

/// Whether a request body that is streamed through has failed. By default it never does: it has come before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failed(Option<Arc<AtomicBool>>);

#[derive(Default)]
struct Buffered {
    data: Option<Bytes>,
    trailers: Option<Box<HeaderMap>>,
}

pin_project! {
    /// What the caller gets to read: the inner service's body as it comes, or what the layer answers in its place.
    #[derive(Debug)]
    pub struct ResponseBody<R> {
        #[pin]
        kind: ResponseKind<R>,
    }
}

pin_project! {
    #[project = ResponseKindProjection]
    #[derive(Debug)]
    enum ResponseKind<R> {
        Inner { #[pin] body: R },
        Buffered { buffered: Buffered },
        Piped { pieces: mpsc::Receiver<Piece>, left: Option<u64>, ended: bool },
    }
}

/// What comes out of the attempt that drives a body too slow or too large to be kept.
#[derive(Debug)]
pub(crate) enum Piece {
    End,
    Failed(BoxError),
    Frame(Frame<Bytes>),
}

/// The attempt was given up before its body ended.
#[derive(Debug)]
struct Truncated;

// === impl RequestBody ===

impl<B> RequestBody<B> {
    pub(crate) fn untouched(body: B) -> Self {
        Self { buffered: Buffered::default(), rest: Some(body), started: None, failed: Failed::default() }
    }

    pub(crate) fn watched(body: B, failed: Failed) -> Self {
        Self { failed, ..Self::untouched(body) }
    }

    pub(crate) fn buffered(data: Bytes, trailers: Option<Box<HeaderMap>>) -> Self {
        Self { buffered: Buffered { data: Some(data), trailers }, rest: None, started: None, failed: Failed::default() }
    }

    pub(crate) fn resumed(data: Bytes, started: Pin<Box<B>>) -> Self {
        Self { started: Some(started), ..Self::buffered(data, None) }
    }

    fn unread(&self) -> Option<&B> {
        self.rest.as_ref().or(self.started.as_deref())
    }
}

impl<B: Body<Data = Bytes>> Body for RequestBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if let Some(frame) = this.buffered.next() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let frame = match (this.rest.as_pin_mut(), this.started) {
            (Some(rest), _) => ready!(rest.poll_frame(cx)),
            (None, Some(started)) => ready!(started.as_mut().poll_frame(cx)),
            (None, None) => None,
        };
        if let Some(Err(_)) = &frame {
            this.failed.set();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.buffered.is_empty() && self.unread().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        if self.buffered.trailers.is_some() {
            return self.buffered.size_hint();
        }
        let mut hint = self.unread().map_or_else(|| SizeHint::with_exact(0), Body::size_hint);
        let here = self.buffered.len();
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(here));
        }
        hint.set_lower(hint.lower().saturating_add(here));
        hint
    }
}

impl Failed {
    pub(crate) fn not_yet() -> Self {
        Self(Some(Arc::default()))
    }

    fn set(&self) {
        if let Some(failed) = &self.0 {
            failed.store(true, Ordering::Release);
        }
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.as_ref().is_some_and(|failed| failed.load(Ordering::Acquire))
    }
}

// === impl ResponseBody ===

impl<R> ResponseBody<R> {
    pub(crate) fn inner(body: R) -> Self {
        Self { kind: ResponseKind::Inner { body } }
    }

    pub(crate) fn buffered(data: Bytes, trailers: Option<Box<HeaderMap>>) -> Self {
        Self { kind: ResponseKind::Buffered { buffered: Buffered { data: Some(data), trailers } } }
    }

    /// What there was of a body that failed, and why.
    pub(crate) fn broken_off(data: Bytes, error: BoxError) -> Self {
        let (sender, pieces) = mpsc::channel(2);
        // There is room for two.
        let _ = sender.try_send(Piece::Frame(Frame::data(data)));
        let _ = sender.try_send(Piece::Failed(error));
        Self::piped(pieces, None)
    }

    /// `left` is the length of the body where it is known.
    pub(crate) fn piped(pieces: mpsc::Receiver<Piece>, left: Option<u64>) -> Self {
        Self { kind: ResponseKind::Piped { pieces, left, ended: false } }
    }
}

impl<R> Body for ResponseBody<R>
where
    R: Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().kind.project() {
            ResponseKindProjection::Inner { body } => {
                body.poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
            }
            ResponseKindProjection::Buffered { buffered } => Poll::Ready(buffered.next().map(Ok)),
            ResponseKindProjection::Piped { ended: true, .. } => Poll::Ready(None),
            ResponseKindProjection::Piped { pieces, left, ended } => Poll::Ready(match ready!(pieces.poll_recv(cx)) {
                Some(Piece::Frame(frame)) => {
                    if let (Some(left), Some(data)) = (left, frame.data_ref()) {
                        *left = left.saturating_sub(data.len() as u64);
                    }
                    Some(Ok(frame))
                }
                end => {
                    *ended = true;
                    match end {
                        Some(Piece::Failed(error)) => Some(Err(error)),
                        Some(Piece::End) => None,
                        _ => Some(Err(Truncated.into())),
                    }
                }
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            ResponseKind::Inner { body } => body.is_end_stream(),
            ResponseKind::Buffered { buffered } => buffered.is_empty(),
            ResponseKind::Piped { ended, .. } => *ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            ResponseKind::Inner { body } => body.size_hint(),
            ResponseKind::Buffered { buffered } => buffered.size_hint(),
            ResponseKind::Piped { left, .. } => left.map(SizeHint::with_exact).unwrap_or_default(),
        }
    }
}

// === impl Buffered ===

impl Buffered {
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let data = self.data.take().filter(|data| !data.is_empty()).map(Frame::data);
        data.or_else(|| self.trailers.take().map(|trailers| Frame::trailers(*trailers)))
    }

    fn len(&self) -> u64 {
        self.data.as_ref().map_or(0, |data| data.len() as u64)
    }

    fn is_empty(&self) -> bool {
        self.len() == 0 && self.trailers.is_none()
    }

    /// An exact length would be sent on as `Content-Length`, which leaves no room for trailers in HTTP/1.1.
    fn size_hint(&self) -> SizeHint {
        match self.trailers {
            None => SizeHint::with_exact(self.len()),
            Some(_) => SizeHint::default(),
        }
    }
}

impl std::fmt::Debug for Buffered {
    /// Without what has no place in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{} bytes>", self.len())
    }
}

// === impl Truncated ===

impl std::fmt::Display for Truncated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the attempt ended before its response body")
    }
}

impl std::error::Error for Truncated {}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};

    use super::*;

    #[tokio::test]
    async fn a_pipe_that_breaks_off_is_an_error_and_not_an_end() {
        let (sender, pieces) = mpsc::channel(2);
        sender.send(Piece::Frame(Frame::data(Bytes::from_static(b"ab")))).await.unwrap();
        drop(sender);
        let body = ResponseBody::<Full<Bytes>>::piped(pieces, None);
        assert!(body.collect().await.is_err());
    }
}
