-- Takes a key that is gone, free, or whose lease is over.
-- ARGV: the claim running, its lifetime in ms, its lease in ms, '1' where another fingerprint refuses it.
if not gone then
  if state == 'D' then return {'done', redis.call('GET', KEYS[1])} end
  if id_of(head) == id_of(ARGV[1]) then
    if state == 'R' then return {'acquired', attempt} end
    return {'running', head, 0} -- a claim that was released and comes late
  end
  local refused = ARGV[4] == '1' and head:byte(4) ~= 2 -- not of a key that was forgotten
  if refused and fingerprint_of(head) ~= fingerprint_of(ARGV[1]) then return {'mismatch'} end
  if state == 'R' then
    local ttl = redis.call('PTTL', KEYS[1])
    if ttl < 0 then -- somebody removed the deadline: nobody knows when the lease began, so it begins now
      ttl = retention + tonumber(ARGV[3])
      redis.call('PEXPIRE', KEYS[1], string.format('%.0f', ttl))
    end
    if ttl > retention then return {'running', head, ttl - retention} end
  end
end
-- Who held it when its lease ended has died, and may have had an effect.
redis.call('SET', KEYS[1], with(ARGV[1], 'R', attempt + 1, remembered or state == 'R'), 'PX', ARGV[2])
return {'acquired', attempt + 1}
