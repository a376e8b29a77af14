//! What comes of the inner service.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, response};
use http_body::Body;
use tower::{BoxError, Service};

use super::{Run, Told, told};
use crate::body::{RequestBody, ResponseBody};
use crate::collect::{Collector, Filled};
use crate::policy::is_endless;
use crate::telemetry::RunTimer;
use crate::terms::Verdict;
use crate::within::within;

/// What came of the inner service.
pub(super) enum Ran<R, E> {
    AlreadyApplied(response::Parts),
    BodyFailed(response::Parts, Bytes, BoxError),
    /// A response that declares that it does not end.
    Endless(response::Parts, R),
    Error(E),
    /// The inner service cannot be called any more.
    NeverReady(E),
    NotReady,
    /// Too large or too slow to be kept: what has been read, and the rest.
    Streaming(response::Parts, Bytes, Pin<Box<R>>),
    /// What came of it is not one that is kept. With for how long it is remembered as an attempt.
    Unkept(Duration, Told<R>),
    Whole(response::Parts, Bytes, Option<Box<HeaderMap>>),
}

impl Run {
    /// Runs the inner service and reads its response as far as it may be kept.
    pub(super) fn call<S, B, R>(
        self: Arc<Self>,
        mut inner: S,
        request: Request<RequestBody<B>>,
    ) -> impl Future<Output = Ran<R, S::Error>>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
        R: Body<Data = Bytes>,
        R::Error: Into<BoxError>,
    {
        async move {
            let mut has_waited = false;
            let ready = poll_fn(|cx| {
                let ready = inner.poll_ready(cx);
                has_waited |= ready.is_pending();
                ready
            });
            match within(self.terms.ready_timeout, ready).await {
                // Another may have run meanwhile, where the store was away for longer than the lease.
                Some(Ok(())) if has_waited && self.has_lost() => return Ran::NotReady,
                Some(Ok(())) => {}
                Some(Err(error)) => return Ran::NeverReady(error),
                None => return Ran::NotReady,
            }
            self.lease.begin();
            let _timer = RunTimer::start(self.terms.contract);
            let (head, body) = match inner.call(request).await {
                Ok(response) => response.into_parts(),
                Err(error) => return Ran::Error(error),
            };
            let steering = self.handle.steering();
            if steering.already_applied {
                return Ran::AlreadyApplied(head);
            }
            let verdict = self.terms.verdict(&head);
            if steering.dont_keep || head.status.is_informational() || verdict == Verdict::Unkept {
                let remember = if steering.dont_keep { self.terms.lease } else { self.terms.remembers(&head, None) };
                return Ran::Unkept(remember, told(head, ResponseBody::inner(body)));
            }
            if verdict == Verdict::Kept && is_endless(&head) {
                return Ran::Endless(head, body);
            }
            let mut collector = Collector::new(body, self.terms.max_kept_body);
            let filled = within(self.terms.kept_body_timeout, pin!(collector.fill())).await;
            match filled {
                // The handler may have said so from inside its body.
                Some(Ok(Filled::Whole)) if self.handle.steering().already_applied => Ran::AlreadyApplied(head),
                Some(Ok(Filled::Whole)) => {
                    let (data, trailers, _) = collector.into_parts();
                    if !self.terms.keeps(&head, trailers.as_deref()) {
                        let remember = self.terms.remembers(&head, trailers.as_deref());
                        return Ran::Unkept(remember, told(head, ResponseBody::buffered(data, trailers)));
                    }
                    Ran::Whole(head, data, trailers)
                }
                Some(Ok(Filled::OverCap)) | None => {
                    let (data, _, rest) = collector.into_parts();
                    Ran::Streaming(head, data, rest)
                }
                Some(Err(error)) => Ran::BodyFailed(head, collector.into_parts().0, error.into()),
            }
        }
    }
}
