//! Other crates that answer a duplicate with the first response, each set up as its documentation says.

use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use axum_idempotent::{IdempotentLayer, IdempotentOptions};
use fred::clients::Pool;
use fred::interfaces::ClientLike as _;
use fred::types::config::Config;
use idempotent::valkey::ValkeyStore;
use rustango::cache::redis_backend::RedisCache;
use rustango::idempotency::IdempotencyRouterExt as _;
use ruts::store::Ttl;
use ruts::store::redis::RedisStore;
use ruts::{CookieOptions, Session, SessionLayer};
use tower_cookies::CookieManagerLayer;

use crate::servers::{Place, Role, Server, orders};

const DAY_SECS: i64 = 24 * 60 * 60;

pub fn all() -> Vec<Server> {
    vec![
        Server::new("idempotent", "idempotent 2.0", Role::Rival { signs_in: false }, idempotent),
        Server::new("axum-idempotent", "axum-idempotent 0.6", Role::Rival { signs_in: true }, axum_idempotent),
        Server::new("rustango", "rustango 0.62", Role::Rival { signs_in: false }, rustango),
    ]
}

async fn idempotent(place: Place) -> Result<Router> {
    let store = ValkeyStore::with_url(place.redis).try_build().await?;
    Ok(orders().layer(idempotent::middleware::IdempotencyLayer::new(store)))
}

/// It keeps responses in the session of a client, as fields that expire: that takes Redis 7.4.
async fn axum_idempotent(place: Place) -> Result<Router> {
    // One connection, as all the others have.
    let pool = Pool::new(Config::from_url(&place.redis)?, None, None, None, 1)?;
    pool.init().await?;
    let store = Arc::new(RedisStore::new(Arc::new(pool)).await?);
    let options =
        IdempotentOptions::default().use_idempotency_key_header(Some("Idempotency-Key"), true).expire_after(DAY_SECS);
    Ok(orders()
        .layer(IdempotentLayer::<RedisStore<Pool>>::new(options))
        .route("/session", post(sign_in))
        .layer(SessionLayer::new(store).with_cookie_options(CookieOptions::build().name("session").max_age(86_400)))
        .layer(CookieManagerLayer::new()))
}

async fn sign_in(session: Session<RedisStore<Pool>>) -> Result<&'static str, (StatusCode, String)> {
    let failed = |error: &dyn ToString| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    let lasts = Ttl::new(DAY_SECS).map_err(|error| failed(&error))?;
    session.set("user", &"c-1", lasts, None).await.map_err(|error| failed(&error))?;
    Ok("signed in")
}

async fn rustango(place: Place) -> Result<Router> {
    let cache = Arc::new(RedisCache::new(&place.redis).await?);
    Ok(orders().idempotency(rustango::idempotency::IdempotencyLayer::new(cache)))
}
