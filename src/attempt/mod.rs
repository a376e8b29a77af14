//! One run of the inner service for a key.
//!
//! It runs the inner service, stores what came of it, and only then answers. A client that hangs up changes nothing.

mod attended;
mod call;
mod ended;
mod finish;
mod handle;
mod lease;
mod stream;

use std::any::Any;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Request, Response, response};
use http_body::Body;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tower::{BoxError, Service};

use self::attended::Attended;
use self::call::Ran;
use self::finish::{marked, unstored};
pub use self::handle::Attempt;
use self::lease::Ended;
pub(crate) use self::lease::{Asked, Lease, Pursued};
use crate::body::{Failed, RequestBody, ResponseBody};
use crate::flight::Lead;
use crate::ledger::AttemptTicket as Ticket;
use crate::record::Content;
use crate::rejection::Rejection;
use crate::slot::{self, unslotted};
use crate::sync::{AbortHandle, Mutex, Runtime, lock};
use crate::telemetry::{Executed, Report};
use crate::terms::Terms;
use crate::ticker;

/// An attempt, with all that it holds until it ends.
pub(crate) struct Run {
    terms: Terms,
    lease: Lease,
    started: Instant,
    // Dropped before the lead, since whoever takes that needs a place.
    ticket: Mutex<Ticket>,
    /// Until the attempt has lost, is overdue, or has ended.
    lead: Mutex<Option<Lead>>,
    /// What renews the lease, once there is something; `Some(None)` from when there is to be nothing any more.
    renewals: OnceLock<Option<Renewals>>,
    handle: Attempt,
    /// Whether the request body, where it is streamed through, has failed.
    request_failed: Failed,
}

/// The task that renews a lease.
struct Renewals {
    task: AbortHandle,
    runtime: Runtime,
}

/// Who is to be answered.
struct Client<R, E> {
    reply: Option<oneshot::Sender<Reply<R, E>>>,
    report: Report,
}

enum Reply<R, E> {
    Error(E),
    Panic(Box<dyn Any + Send>),
    Response(Told<R>),
}

/// A response on its way to the client. It is handed on often, and has a part in several futures.
type Told<R> = Box<Response<ResponseBody<R>>>;

/// An attempt on its way: when it ends, in whatever way, its lease is not renewed any more.
struct UnderWay<'a>(&'a Run);

// === impl Run ===

impl Run {
    pub(crate) fn new(terms: Terms, lease: Lease, lead: Lead, request_failed: Failed, ticket: Ticket) -> Self {
        lead.running(lease.claim().fingerprint);
        Self {
            handle: Attempt::new(lease.ledger().clone(), lease.keys(), lease.number()),
            started: Instant::now(),
            terms,
            lease,
            lead: Mutex::new(Some(lead)),
            ticket: Mutex::new(ticket),
            renewals: OnceLock::new(),
            request_failed,
        }
    }

    /// Runs, and waits for what it answers. Who stops waiting stops nothing.
    pub(crate) fn start<S, B, R>(
        self,
        terms: &Terms,
        inner: S,
        mut request: Request<RequestBody<B>>,
        mut report: Report,
    ) -> impl Future<Output = Result<Response<ResponseBody<R>>, S::Error>>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>> + Send + 'static,
        S::Error: Send + 'static,
        S::Future: Send + 'static,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        report.attempt(self.handle.number());
        let outer = request.extensions_mut().remove::<Attempt>();
        request.extensions_mut().insert(self.handle.clone().inside(outer));
        let (reply, replied) = oneshot::channel();
        let client = Client { reply: Some(reply), report };
        let run = Arc::new(self);
        let attempt = Box::pin(Arc::clone(&run).run(inner, request, client));
        let attended = Attended::new(&run, attempt, replied);
        drop(run);
        async move {
            match attended.await {
                Ok(Reply::Response(response)) if terms.mark_first => Ok(marked(*response)),
                Ok(Reply::Response(response)) => Ok(*response),
                Ok(Reply::Error(error)) => Err(error),
                Ok(Reply::Panic(panic)) => resume_unwind(panic),
                // The runtime is ending, and the attempt with it.
                Err(_) => Ok(terms.refuse(Rejection::ShuttingDown)),
            }
        }
    }

    fn run<S, B, R>(
        self: Arc<Self>,
        inner: S,
        request: Request<RequestBody<B>>,
        client: Client<R, S::Error>,
    ) -> impl Future<Output = ()>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
        R: Body<Data = Bytes>,
        R::Error: Into<BoxError>,
    {
        // Each step has a box of its own: together they would take more than an allocator has at hand, and one has ended when the
        // next begins.
        let call = Box::pin(Arc::clone(&self).call(inner, request));
        async move {
            let _under_way = UnderWay(&self);
            let ran = AssertUnwindSafe(call).catch_unwind().await;
            match ran {
                Err(panic) => self.fail(Reply::Panic(panic), client, Executed::Panicked).await,
                Ok(Ran::Error(error)) => self.fail(Reply::Error(error), client, Executed::Error).await,
                // The lease is still adrift: given up without having run, it is not counted.
                Ok(Ran::NotReady) => {
                    self.give_up();
                    client.refuse(&self.terms, Rejection::InnerNotReady);
                }
                Ok(Ran::NeverReady(error)) => {
                    self.give_up();
                    client.fail(error);
                }
                Ok(Ran::Unkept(remember, mut response)) => {
                    if self.handle.steering().dont_keep {
                        response = unstored(response);
                    }
                    let reply = Reply::Response(response);
                    Box::pin(self.release(remember, Some(reply), client, Executed::Released)).await;
                }
                Ok(Ran::BodyFailed(head, data, error)) => {
                    let reply = Reply::Response(told(head, ResponseBody::broken_off(data, error)));
                    self.fail(reply, client, Executed::FailedBody).await;
                }
                Ok(Ran::Streaming(head, data, rest)) => Box::pin(self.stream(head, data, rest, client)).await,
                Ok(Ran::Whole(mut head, body, trailers)) => {
                    self.announce_expiry(&mut head);
                    let record = self.terms.record(&head, body.clone(), trailers.as_deref().cloned());
                    let response = told(head, ResponseBody::buffered(body, trailers));
                    let (response, executed) = match &record.content {
                        Content::Kept { .. } => (response, Executed::Kept),
                        Content::Tombstone => (unstored(response), Executed::Tombstone),
                    };
                    self.complete(record.encode(), response, client, executed).await;
                }
                Ok(Ran::AlreadyApplied(head)) => {
                    let record = self.terms.tombstone(&self.terms.applied(head), None);
                    let encoded = record.encode();
                    let response = self.terms.replay(record).unwrap_or_else(|refusal| self.terms.refuse(refusal));
                    self.complete(encoded, Box::new(response), client, Executed::AlreadyApplied).await;
                }
                Ok(Ran::Endless(head, body)) => {
                    let record = self.terms.tombstone(&head, None);
                    let response = unstored(told(head, ResponseBody::inner(body)));
                    self.complete(record.encode(), response, client, Executed::Tombstone).await;
                }
            }
        }
    }

    /// Gives the key back after an attempt that may have had an effect.
    fn fail<R, E>(
        &self,
        reply: Reply<R, E>,
        client: Client<R, E>,
        executed: Executed,
    ) -> Pin<Box<impl Future<Output = ()>>> {
        Box::pin(self.release(self.terms.retention, Some(reply), client, executed))
    }

    /// Renews the lease until it is lost, and says so. From the time an attempt is overdue it only watches.
    async fn renew(self: Arc<Self>) {
        let renewed = AssertUnwindSafe(self.lease.renew(self.overdue())).catch_unwind().await;
        // A store that panics says nothing of the claim, but nobody else is left to make way.
        let Ok(ended) = renewed else { return self.step_down() };
        if let Ended::Overdue = ended {
            // What hangs does not keep others from running, as long as not too many do.
            if let Some(ticket) = self.lease.ledger().overdue() {
                lock(&self.ticket).exchange(ticket);
            }
            self.step_down();
            self.lease.watch().await;
        }
        self.handle.set_lost();
        self.step_down();
    }

    fn overdue(&self) -> Instant {
        self.started + self.terms.max_attempt
    }

    /// Whether another may run in its place, as far as can be told.
    fn has_lost(&self) -> bool {
        self.handle.is_lost() || self.lease.is_over()
    }

    /// Whether by then the lease is to be renewed, or the attempt is overdue.
    fn is_due_by(&self, then: Instant) -> bool {
        self.lease.is_due_by(then) || self.overdue() <= then
    }

    /// Has the lease renewed in a task of its own, if it is not yet: a handler that blocks its thread must not lose its lease by
    /// that.
    fn start_renewals(self: &Arc<Self>, runtime: &Runtime) {
        if self.renewals.get().is_some() {
            return;
        }
        let awake = ticker::keep_awake(runtime);
        let run = Arc::clone(self);
        let renewing = unslotted(runtime.clone(), async move {
            run.renew().await;
            drop(awake);
        });
        let task = self.lease.ledger().spawn(runtime, renewing);
        if let Err(Some(too_late)) = self.renewals.set(Some(Renewals { task, runtime: runtime.clone() })) {
            too_late.stop();
        }
    }

    /// Renews no more: a key that is finished or given back must not come to life again.
    fn stop_renewals(&self) {
        if self.renewals.set(None).is_err()
            && let Some(Some(renewals)) = self.renewals.get()
        {
            renewals.stop();
        }
    }

    /// Whether what came of it is not to be kept after all: half a request brought it about, or the handler said so late.
    fn is_withdrawn(&self) -> bool {
        self.request_failed.is_set() || self.handle.steering().dont_keep
    }
}

fn told<R>(head: response::Parts, body: ResponseBody<R>) -> Told<R> {
    Box::new(Response::from_parts(head, body))
}

// === impl Renewals ===

impl Renewals {
    fn stop(&self) {
        self.task.abort();
        // Or what it holds would wait for a thread that the caller may block.
        slot::clear(&self.runtime);
    }
}

// === impl UnderWay ===

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.stop_renewals();
    }
}
