-- Starts the lease anew, also on a server that lost its data. ARGV: the claim running, its lifetime in ms.
if gone then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
if id_of(head) ~= id_of(ARGV[1]) or state == 'F' then return 0 end
if state == 'R' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
